"""Leaves in a session of cosmic-ray a uniform sample of its mutants, the same for the same seed.

    python sample.py SESSION COUNT SEED

`COUNT` 0 leaves all. What a filter has set aside goes for good, for cr-rate counts it as killed;
and so do mutants that are no Python, which it takes no test to notice.
"""

import itertools
import random
import sys
import warnings

from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db


def is_python(item) -> bool:
    (mutant,) = item.mutations
    operator = get_operator(mutant.operator_name)()
    code = mutate_code(mutant.module_path.read_text(), operator, mutant.occurrence)
    try:
        compile(code, mutant.module_path, "exec")
    except SyntaxError:
        return False
    return True


def place(item) -> tuple:
    (mutant,) = item.mutations
    return mutant.module_path, mutant.operator_name, mutant.occurrence


def main(session: str, count: str, seed: str) -> None:
    warnings.simplefilter("ignore")  # A mutant may compare a number by `is`.
    with use_db(session, WorkDB.Mode.open) as db:
        items = sorted(db.pending_work_items, key=place)
        random.Random(int(seed)).shuffle(items)
        sample = list(itertools.islice(filter(is_python, items), int(count) or None))
        db.clear()
        db.add_work_items(sample)
    print(f"{len(sample)} of {len(items)} mutants, drawn with seed {seed}")


if __name__ == "__main__":
    main(*sys.argv[1:])
