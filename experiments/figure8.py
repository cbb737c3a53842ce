"""Figure 8: depth, width, MLP and patches of a ViT scaled, each alone and all (Appendix D.2)."""

from typing import TYPE_CHECKING

from experiments import paper
from experiments.runner import command
from experiments.runner.experiment import Experiment, Measurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.runner.results import Results
    from experiments.runner.setting import Setting

BASE = paper.FIGURE_8_BASE
# Chosen here. That depth goes up to 64 layers is from memory of the paper.
SCALED = {
    "Depth": [{"num_layers": layers} for layers in (4, 16, 32, 64)],
    "Patch size": [{"patch_size": side} for side in (16, 8)],
    "Width MLP": [{"mlp_dim": width} for width in (1024, 4096, 8192)],
    "Width": [{"hidden_size": width} for width in (512, 2048)],
    "All": [
        {"num_layers": 4, "hidden_size": 512, "mlp_dim": 1024, "patch_size": 32},
        {"num_layers": 12, "hidden_size": 1536, "mlp_dim": 3072, "patch_size": 16},
    ],
}


def name_of(sizes: dict[str, int]) -> str:
    """The name of a model of the base's sizes but for some."""
    each = BASE | sizes
    shape = (each["num_layers"], each["hidden_size"], each["mlp_dim"])
    return f"ViT-{'-'.join(map(str, shape))}/{each['patch_size']}"


def measure(setting: "Setting") -> list[Measurement]:
    """Lists the models of every line, the base in each."""
    base = setting.exaflops(setting.pretrain(name_of({}), "jft"))
    found = []
    for scaled, models in SCALED.items():
        for name in map(name_of, [{}, *models]):
            runs = [setting.pretrain(name, "jft", seed=seed) for seed in range(setting.seeds)]
            relative = setting.exaflops(runs[0]) / base
            labels = {"scaled": scaled, "model": name}
            found.append(Measurement(labels, runs, setting.fewshot_metric, x=relative))
    return found


def draw(results: "Results") -> "Figure":
    """Draws a line for each dimension."""
    from experiments.runner import pictures

    figure, (axes,) = pictures.panels(1, width=5.6, height=4.2)
    styles = pictures.series_styles(SCALED)
    pictures.points(axes, results, label="scaled", log="x", styles=styles, names=False)
    axes.set(xlabel="relative compute", ylabel="linear 5-shot ImageNet top-1 [%]")
    return pictures.finish(figure)


EXPERIMENT = Experiment(
    "figure8",
    "Figure 8: scaling the dimensions of the Vision Transformer",
    measure,
    rows=("scaled", "model"),
    draw=draw,
    about="A ViT of 8 layers, D 1024, MLP 2048 and patches of 32 pixels, where all lines meet, "
    "and what becomes of it when one dimension is scaled, or all. The compute is that of "
    "pre-training, relative to the base. Chosen here: the sizes, pre-training as that of ViT-B "
    "in Table 3, and the few-shot accuracy, that of ImageNet. The paper's points are not known "
    "here. A model's name has its layers, D, MLP and patch.",
)

if __name__ == "__main__":
    command.run(EXPERIMENT)
