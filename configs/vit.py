"""Any model by its name, under the paper's recipes or those that one writes after it.

    --config configs/vit.py:ViT-Ti/16                               pre-train on ImageNet (Table 3)
    --config configs/vit.py:R50+ViT-B/16,pretrain,imagenet21k
    --config configs/vit.py:ViT-S/32,finetune,cifar10               fine-tune (Table 4)
    --config configs/vit.py:R152x2,finetune,imagenet2012
    --config configs/vit.py:Axial-ViT-B/16,masked,jft               Appendix B.1.2
    --config configs/vit.py:ViT-S/16,augreg,imagenet2012            later presets: AugReg
    --config configs/vit.py:ViT-S/16,baseline,imagenet2012,300      the plain baseline, 300 epochs
    --config configs/vit.py:B/32,transfer,cifar10                   big_vision's fine-tuning
    --config configs/vit.py:R50x1,bit_hyperrule,oxford_flowers102   BiT's
    --config configs/vit.py:b16,cifar10                             fine-tune, as the official code

`vit_jax.models.model_config` lists the names; those of the official code (b16, ti16, r50_b16,
ViT-B_16) and of big_vision (B/16) are read too. `vit_jax.recipes.get_config` has what may follow.
"""

import difflib

from ml_collections import ConfigDict

from vit_jax import recipes
from vit_jax.errors import UserError, brief, brief_name


def get_config(spec: str = "ViT-B/16") -> ConfigDict:
    """The config of "MODEL", "MODEL,RECIPE,DATASET" or, to fine-tune, "MODEL,DATASET"."""
    model, _, rest = spec.partition(",")
    return recipes.get_config(recipes.model_name(model), _with_recipe(rest))


def _with_recipe(spec: str) -> str:
    first, _, rest = spec.partition(",")
    named = difflib.get_close_matches(first, recipes.RECIPES, n=1, cutoff=0.75)
    # The name of a folder may have commas in it.
    is_dataset = first.startswith(("folder:", "list:")) or {*rest.split(",")} <= {"", "dev", "512"}
    if not spec or named:
        return spec
    if not is_dataset:
        _refuse_words_of_a_preset(spec, {*rest.split(",")} - {"", "dev"})
        return spec
    return f"finetune,{spec}"


def _refuse_words_of_a_preset(spec: str, words: set[str]) -> None:
    """Tells of a data set with options, such as "cifar10,inception", which preset has these."""
    for name, preset in recipes.PRESETS.items():
        if words <= preset.options.keys():
            raise UserError(
                f"spec {brief(spec)} names no recipe, and {' and '.join(sorted(words))} is a word "
                f"of {name}: use {name},{brief_name(spec)}"
            )
