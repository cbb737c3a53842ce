"""Table 8: position embeddings, and where they are added."""

from typing import TYPE_CHECKING

from experiments import paper
from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement, Run

if TYPE_CHECKING:
    from experiments.runner.setting import Setting

EMBEDDINGS = {"none": "none", "learned": "1D", "2d": "2D", "relative": "relative"}
PLACES = {"stem": "at the stem", "layers": "in every layer", "shared": "in every layer, shared"}
DEFAULT = ("learned", "stem")


def measure(setting: "Setting") -> list[Measurement]:
    """Lists the cells of the paper."""
    return [
        Measurement(
            {"position embedding": EMBEDDINGS[embedding], "placement": PLACES[place]},
            pretrainings(setting, embedding, place),
            setting.fewshot_metric,
            paper=accuracy,
        )
        for (embedding, place), accuracy in paper.TABLE_8.items()
    ]


def pretrainings(setting: "Setting", embedding: str, place: str) -> list[Run]:
    """The pre-trainings of ViT-B/16 with a position embedding, one for each seed."""
    changes = {"model.position_embedding": embedding, "model.position_placement": place}
    options = {} if (embedding, place) == DEFAULT else {"changes": changes}
    variant = "" if (embedding, place) == DEFAULT else f"positions-{embedding}-{place}"
    return [
        setting.pretrain("ViT-B/16", "jft", seed=seed, variant=variant, **options)
        for seed in range(setting.seeds)
    ]


EXPERIMENT = Experiment(
    "table8",
    "Table 8: position embeddings",
    measure,
    rows=("position embedding",),
    column="placement",
    about="ViT-B/16 pre-trained on JFT-300M with each kind of position embedding, scored by "
    "linear classification from 5 images a class of ImageNet. In the paper, no embeddings are "
    "clearly worse and all others are alike. The paper has one number each; here every seed is "
    "a pre-training of its own, for without a deviation a difference says little. Only position "
    "embeddings that are added have a place.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
