import pytest

from vit_jax.checkpoints.infer import usual_num_heads
from vit_jax.errors import UserError


# Table 1 of the paper, and Ti and S of DeiT (2012.12877), Table 1.
@pytest.mark.parametrize(
    ("num_layers", "hidden_size", "mlp_dim", "num_heads"),
    [
        (12, 192, 768, 3),
        (12, 384, 1536, 6),
        (12, 768, 3072, 12),
        (24, 1024, 4096, 16),
        (32, 1280, 5120, 16),
    ],
)
def test_the_heads_of_a_published_model_are_known_by_its_sizes(
    num_layers, hidden_size, mlp_dim, num_heads
):
    assert usual_num_heads(hidden_size, num_layers, mlp_dim) == num_heads
    with pytest.raises(UserError, match=f"how many heads a ViT of {num_layers + 1} layers, width"):
        usual_num_heads(hidden_size, num_layers + 1, mlp_dim)
