"""Checks that this machine computes correctly, and lists what it has: `python -m vit_jax.doctor`.

Tells the versions, the devices, what each optional part lacks and where data sets and weights lie.
Then every device computes the operations of the models and some training steps of a small ViT,
compiled and operation by operation, in 32 and in 16 bits, which are held against NumPy in 64 bits.
"""

import os
import platform
import sys
from collections.abc import Iterable, Sequence

from vit_jax import __version__, command
from vit_jax.doctor import environment
from vit_jax.printable import printable

_EPILOG = """exit codes:
  0  every device computes what it should
  1  one does not: trust no result of it"""


def build_parser(prog: str) -> command.Parser:
    """Returns the parser of the command, which has no flags."""
    return command.Parser(prog=prog, description=__doc__, epilog=_EPILOG)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    build_parser("python -m vit_jax.doctor").parse_args(argv)
    _print_environment()
    # Here because JAX takes half a second to import, for which --help should not wait.
    import jax

    from vit_jax.doctor import arithmetic

    if os.environ.get("XLA_FLAGS"):
        print(printable(f"XLA_FLAGS: {os.environ['XLA_FLAGS']}"))
    faults = []
    for device in _devices():
        error = arithmetic.default_product_error(device)
        print(f"\n{device} ({device.device_kind}): error against NumPy in 64 bits", flush=True)
        results = list(arithmetic.check_device(device))
        _print_results(results, arithmetic.LIMITS)
        if error > arithmetic.LIMITS["float32"]:
            print(
                f"By default products of float32 are rounded here ({error:.0e}); "
                f"JAX_DEFAULT_MATMUL_PRECISION=highest computes them as above."
            )
        faults += [f"{device}: {r.check} in {r.dtype}" for r in results if not r.passed]
    if faults:
        print(f"\n{len(faults)} of the results are wrong: {faults[0]}", file=sys.stderr)
        print(
            f"error: jax {jax.__version__} computes wrong numbers here: trust no result, install "
            "the newest jax, and run this again",
            file=sys.stderr,
        )
        return 1
    print("\nEverything is computed as it should be.")
    return 0


def _devices() -> Iterable:
    """All devices of this process, and the CPU, which computes beside them."""
    import jax

    devices = jax.local_devices()
    if all(device.platform != "cpu" for device in devices):
        devices += jax.local_devices(backend="cpu")[:1]
    return devices


def _print_environment() -> None:
    print(f"vit_jax {__version__}, Python {platform.python_version()}, {platform.platform()}")
    found = [(name, environment.version(name)) for name in environment.PACKAGES]
    print(", ".join(f"{name.split('|')[-1]} {version}" for name, version in found if version))
    print()
    for part in environment.PARTS:
        lacking = environment.missing(part)
        state = f"lacks {', '.join(lacking)}: {part.way}" if lacking else "yes"
        print(f"{part.name:34}{state}")
    print()
    for name, path, content in environment.places():
        print(printable(f"{name:34}{path}: {content}"))
    print(flush=True)


def _print_results(results: Iterable, limits: dict[str, float]) -> None:
    """A row for each check, a column for each dtype and way to run it."""
    columns = {(r.dtype, r.jitted): f"{r.dtype}, {'jit' if r.jitted else 'eager'}" for r in results}
    cells = {(r.check, r.dtype, r.jitted): r for r in results}
    checks = dict.fromkeys(r.check for r in results)
    print(f"{'':40}" + "".join(f"{title:>17}" for title in columns.values()))
    for check in checks:
        row = [cells[check, *column] for column in columns]
        marks = (f"{r.error:.1e} {'pass' if r.passed else 'FAIL'}" for r in row)
        print(f"{check:40}" + "".join(f"{mark:>17}" for mark in marks))
    print(f"{'at most':40}" + "".join(f"{f'{limits[d]:.0e}     ':>17}" for d, _ in columns))


if __name__ == "__main__":
    command.run(main)
