"""Knowledge distillation as in DeiT (Touvron et al., 2021, arXiv 2012.12877, Section 4)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

KINDS = ("hard", "soft")


class Distillation(NamedTuple):
    """The way in which a model learns from a teacher.

    Attributes:
        kind: "hard", from the class that the teacher predicts, or "soft", from its probabilities.
        alpha: the share of the loss that is the teacher's; the rest is the labels'.
        temperature: of "soft": the logits of both are divided by it.
    """

    kind: str
    alpha: float
    temperature: float

    def loss(self, of_labels: jax.Array, logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
        """The loss of each image, Eq. 2 ("soft") or Eq. 3 ("hard", whose alpha is 1/2).

        Of Eq. 2 the divergence is summed over the classes and that of the student from the
        teacher, as Hinton et al. (2015) have it; DeiT's code divides it by their number as well.

        Args:
            of_labels: the loss by the labels, [batch].
            logits: of the student, [batch, classes]; of its distillation head where it has one.
            teacher_logits: likewise.

        Returns:
            [batch] float32.
        """
        if self.kind == "hard":
            predicted = jnp.argmax(teacher_logits, axis=-1)
            taught = optax.softmax_cross_entropy_with_integer_labels(logits, predicted)
        else:
            student, teacher = (
                jax.nn.log_softmax(x.astype(jnp.float32) / self.temperature)
                for x in (logits, teacher_logits)
            )
            divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
            taught = self.temperature**2 * divergence
        return (1.0 - self.alpha) * of_labels + self.alpha * taught
