import csv
import dataclasses
import io

from hypothesis import strategies as st

from vit_jax.checkpoints import augreg

from .mutations import TEXT, mutated

COLUMNS = [field.name for field in dataclasses.fields(augreg.Entry)]
ROW = dict.fromkeys(COLUMNS, "0.5") | {
    "name": "B/16", "ds": "i21k", "filename": "B_16-i21k-x", "adapt_ds": "cifar10",
    "adapt_resolution": "224", "adapt_filename": "B_16-i21k-x--y",
}  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(["", "nan", "inf", "-1", "1e400", "9" * 5000, "1_0", "\x1b[2J", "a\nb", '"']),
    TEXT,
)


def written(rows):
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode(errors="surrogatepass")


FILE = written([ROW, ROW | {"final_val": "0.6", "filename": "B_16-i21k-z"}])
CHANGES = st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=3)


def read(path):
    index = augreg.read_index(path)
    name = augreg.recommended(index, "B_16", "cifar10", 224)
    assert name in {row.adapt_filename for row in index}


def test_augreg(fuzz):
    changed = st.lists(CHANGES, max_size=3).map(lambda rows: written(ROW | row for row in rows))
    fuzz("augreg", st.one_of(mutated(FILE), changed), read, sound=[FILE], name="index.csv")
