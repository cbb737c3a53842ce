"""Fine-tuning as the paper reports it (Table 4): `vit-jax sweep`, see `vit_jax.sweep`.

python -m experiments.sweep --config b16:finetune,cifar10 --config.init_from=B_16
"""

import functools

from vit_jax import command
from vit_jax.sweep import main

if __name__ == "__main__":
    command.run(functools.partial(main, prog="python -m experiments.sweep"))
