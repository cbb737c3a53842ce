"""The routes: from a request to its answer."""

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from vit_jax import __version__
from vit_jax.errors import UserError, brief, brief_name, nearest
from vit_jax.evaluation.ranking import TOP_K
from vit_jax.printable import printable
from vit_jax.serving import uploads
from vit_jax.serving.batching import Batcher, Full, Room
from vit_jax.serving.limits import RETRY_AFTER, Limits, Refusal
from vit_jax.serving.metrics import CONTENT_TYPE, Metrics
from vit_jax.serving.page import make_page
from vit_jax.serving.served import Served
from vit_jax.serving.uploads import Upload

if TYPE_CHECKING:  # It imports JAX.
    from vit_jax.serving.attention import Attention

T = TypeVar("T")
# The part of an answer that a row of outputs gives.
OfRow = Callable[[np.ndarray], dict[str, Any]]

# Beyond these it would be minutes until an answer; each takes a few tenths of a second.
_ATTENTION_IN_WORK = 8
# Numbers in an answer, but for that to one image: some 20 bytes each in JSON.
_MOST_VALUES = 2**20
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
    """The bounds of a server; each is a flag of the command, see its help.

    Attributes:
        max_batch: images that the model runs at once.
        max_delay_ms: for which an image waits for others.
        max_queue: images in work at a time.
        max_bytes: of the body of a request.
        max_files: of a request.
        upload_seconds: for a body to arrive.
    """

    max_batch: int = 8
    max_delay_ms: float = 5.0
    max_queue: int = 256
    max_bytes: int = 32 * 2**20
    max_files: int = 32
    upload_seconds: float = 30.0


_FILE = {"type": "string", "format": "binary"}
_FORM = {"type": "object", "additionalProperties": _FILE}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"image/*": {"schema": _FILE}, "multipart/form-data": {"schema": _FORM}},
    }
}


def create_app(
    served: Served, options: Options = Options(), attention: "Attention | None" = None
) -> Limits:
    """Makes the application of a model, in ASGI.

    Args:
        served: the model.
        options: its bounds.
        attention: draws what the model looks at; None: that is not served.
    """
    paths = "/", "/health", "/metrics", "/model", "/predict", "/attention", f"/{served.output}"
    metrics = Metrics(frozenset(paths))
    service = _Service(served, options, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with service.batcher.running():
            yield
        service.close()

    app = FastAPI(
        title=f"vit-jax serve: {served.name}",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # These pages load scripts from elsewhere.
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_errors(app)
    _add_facts(app, service, attention is not None)
    _add_answers(app, service, attention)
    return Limits(
        app,
        max_bytes=options.max_bytes,
        seconds=options.upload_seconds,
        answered=metrics.answered,
    )


def _add_facts(app: FastAPI, service: "_Service", has_attention: bool) -> None:
    """Adds the routes that tell of the model and of the server."""
    served, options = service.served, service.options
    page, policy = make_page(served, options, has_attention)

    @app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        """A page on which one drops a picture."""
        return HTMLResponse(page, headers={"content-security-policy": policy})

    @app.get("/health")
    async def health() -> JSONResponse:
        """Tells whether the server lives, and whether it is ready for images."""
        live = service.batcher.is_running
        ready = live and service.room.taken < options.max_queue
        return JSONResponse({"live": live, "ready": ready}, 200 if ready else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Counters and times, as Prometheus reads them."""
        service.metrics.in_work.set(service.room.taken)
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/model")
    async def model() -> dict[str, Any]:
        """The model: its input, preprocessing, classes, checksums, and the bounds of the server."""
        bounds = dataclasses.asdict(options)
        return {**served.describe(), "limits": bounds, "attention": has_attention}


def _add_answers(app: FastAPI, service: "_Service", attention: "Attention | None") -> None:
    """Adds the routes that take images."""
    served = service.served
    raw = f"/{served.output}"
    values = max(1, math.prod(served.output_shape))
    if values > _MOST_VALUES:
        raise UserError(
            f"the model gives {values:,} numbers an image, and an answer has {_MOST_VALUES:,} at "
            "most: export it with other --outputs or a smaller --image_size"
        )
    most = _MOST_VALUES // values

    @app.post("/predict", openapi_extra=_BODY)
    async def predict(
        request: Request, top_k: Annotated[int, Query(ge=1)] = TOP_K
    ) -> dict[str, Any]:
        """The most probable classes of images."""
        _check_query(request, "top_k")
        if not served.has_classes:
            raise Refusal(404, f"the model gives {served.output}, no classes: use POST {raw}")
        return await service.answer(
            request, lambda row: {"predictions": served.classes(row, top_k)}
        )

    @app.post(raw, openapi_extra=_BODY)
    async def outputs(request: Request) -> dict[str, Any]:
        """The outputs of the model for images, as they are."""
        _check_query(request)
        return await service.answer(request, lambda row: {served.output: row.tolist()}, most)

    @app.post("/attention", response_class=Response, openapi_extra=_BODY)
    async def look(request: Request) -> Response:
        """A picture of what the model looks at in an image, as a PNG."""
        _check_query(request)
        if attention is None:
            raise Refusal(
                404, "attention needs the weights in Flax: start the server with --checkpoint"
            )
        return Response(await service.look(request, attention), media_type="image/png")


class _Service:
    """The model at work for requests: threads that decode, and batches.

    Attributes:
        served: the model.
        options: the bounds of the server.
        metrics: what it counts.
        room: of images in work.
        batcher: runs the model.
    """

    def __init__(self, served: Served, options: Options, metrics: Metrics):
        self.served = served
        self.options = options
        self.metrics = metrics
        threads = min(4, os.cpu_count() or 1)
        self._decoding = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._looking = ThreadPoolExecutor(1, thread_name_prefix="attention")
        self._looking_room = Room(_ATTENTION_IN_WORK)
        self._turn = threading.Lock()
        self.room = Room(options.max_queue)
        self.batcher = Batcher(
            served.predict,
            max_batch=options.max_batch,
            max_delay=options.max_delay_ms / 1000,
            ran=metrics.ran,
        )

    def close(self) -> None:
        """Ends the threads."""
        self._decoding.shutdown()
        self._looking.shutdown()

    async def answer(
        self, request: Request, of_row: OfRow, most_files: int | None = None
    ) -> dict[str, Any]:
        """The answer to a request: for each of its files the result of a row, or its error.

        Args:
            request: whose body was not read yet.
            of_row: makes the result.
            most_files: of this answer, where it is large.

        Raises:
            Refusal: there is no room, or no file has a result.
            ClientDisconnect: nobody waits for it any more.
        """
        with self._room_for(self.room, 1):  # Before the body is read.
            pass
        most = min(self.options.max_files, most_files or self.options.max_files)
        files = await uploads.read(request, most)
        with self._room_for(self.room, len(files)):
            # The room is held until the last has ended, whatever became of the others.
            work = (self._result(file, of_row) for file in files)
            results = await _while_here(request, asyncio.gather(*work, return_exceptions=True))
        refusals = [result for result in results if isinstance(result, Refusal)]
        answers = []
        for file, result in zip(files, results, strict=True):
            if isinstance(result, Refusal):
                answers.append({"file": file.name, "error": result.detail})
            elif isinstance(result, BaseException):
                raise result
            else:
                answers.append({"file": file.name, **result})
        if len(refusals) == len(files):
            raise max(refusals, key=lambda refusal: refusal.status_code)
        return {"results": answers}

    async def look(self, request: Request, attention: "Attention") -> bytes:
        """A picture of what the model looks at in the one file of a request.

        Raises:
            Refusal: as `answer`.
            ClientDisconnect: likewise.
        """
        (file,) = await uploads.read(request, 1)
        with self._room_for(self._looking_room, 1):
            loop = asyncio.get_running_loop()
            name = _name(file)
            work = loop.run_in_executor(self._looking, attention.draw, name, file.content)
            try:
                return await _while_here(request, work)
            except UserError as error:
                raise Refusal(422, str(error)) from error

    async def _result(self, file: Upload, of_row: OfRow) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        read = self._run_raw if self.served.takes_raw else self.served.view
        work = loop.run_in_executor(self._decoding, read, _name(file), file.content)
        try:
            result = await work
        except UserError as error:
            raise Refusal(422, str(error)) from error
        row = result if self.served.takes_raw else await self.batcher.submit(result)
        if not np.isfinite(row).all():
            _log.error("the model gives outputs that are not finite for an image")
            raise Refusal(500, "the model gives outputs that are not finite: mend it")
        return of_row(row)

    def _run_raw(self, name: str, encoded: bytes) -> np.ndarray:
        """The row of an image that the model prepares itself.

        It is decoded by who waits for the model, as what is decoded may be large.
        """
        with self.served.opened(name, encoded) as image, self._turn:
            start = time.monotonic()
            row = self.served.predict(image[None])[0]
            self.metrics.ran(1, time.monotonic() - start)
        return row

    @contextlib.contextmanager
    def _room_for(self, room: Room, count: int) -> Generator[None]:
        try:
            with room.hold(count):
                yield
        except Full:
            raise Refusal(
                503, "the queue is full: try again in a second, or with fewer files", RETRY_AFTER
            ) from None


def _name(file: Upload) -> str:
    return brief_name(file.name or "the image")


async def _while_here(request: Request, work: "asyncio.Future[T]") -> T:
    """The result of work, which is cancelled if the client leaves."""

    async def leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.ensure_future(leaves())
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        for task in (leaving, work):
            task.cancel()
        await asyncio.gather(leaving, work, return_exceptions=True)


def _check_query(request: Request, *known: str) -> None:
    """Refuses query parameters that mean nothing here, or are given twice."""
    names = [name for name, _ in request.query_params.multi_items()]
    for name in names:
        if name not in known:
            near = nearest(name, known)
            way_out = f"did you mean {near}?" if near else f"use {', '.join(known) or 'none'}"
            raise Refusal(400, f"parameter {brief(name)} is unknown: {way_out}")
        if names.count(name) > 1:
            raise Refusal(400, f"parameter {name} is given {names.count(name)} times: once will do")


def _add_errors(app: FastAPI) -> None:
    """Has every error be answered by {"error": one line}."""

    def reply(status: int, text: str, headers: Any = None) -> JSONResponse:
        return JSONResponse({"error": printable(text)}, status, headers)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, Refusal):
            return reply(error.status_code, error.detail, error.headers)
        path = brief_name(request.scope["path"])  # The URL has what the client calls this host.
        ways = {route.path: sorted(route.methods) for route in _routes(app)}
        if error.status_code == 405 and path in ways:
            allowed = ", ".join(ways[path])
            method = brief_name(request.method)
            return reply(405, f"{method} is not for {path}: use {allowed}", {"Allow": allowed})
        text = f"{path} is not here: use one of {', '.join(ways)}"
        return reply(404 if error.status_code == 405 else error.status_code, text)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        value = brief(first.get("input"))
        return reply(400, f"{first['loc'][-1]} is {value}: give a whole number of at least 1")

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, error: ClientDisconnect) -> JSONResponse:
        del error
        return reply(499, "the client left")

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        del error  # It goes to the log, with its traceback.
        return reply(500, "the server failed: its log has the reason; other requests go on")


def _routes(app: FastAPI) -> list[Any]:
    return [route for route in app.routes if getattr(route, "methods", None)]
