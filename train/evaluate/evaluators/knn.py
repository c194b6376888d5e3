"""k-nearest-neighbour classification by the features as they are; nothing is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Gt

from famt.train.evaluate.evaluation import Evaluation

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

    from famt.train.evaluate.features import Images, Results


@dataclass(frozen=True)
class Knn(Evaluation):
    """Classify by a vote of the nearest training images; nothing is learned."""

    k: Annotated[int, Ge(1)] = 20
    """number of neighbours that vote"""
    temperature: Annotated[float, Gt(0)] = 0.07
    """a neighbour at cosine similarity s has exp(s / temperature) votes"""

    metrics: ClassVar = {"k-NN, class token": "top1_cls", "k-NN, mean of patches": "top1_mean"}

    def measure(self, encoder: VisionTransformer, train: Images, val: Images) -> Results:
        """Top-1 accuracy by the class token, and by the mean of the patch tokens."""
        from famt.train.evaluate.features import require_labels, standard_error, top1
        from famt.train.evaluate.neighbours import predict

        require_labels(train, val)
        known, asked = train.features(encoder), val.features(encoder)
        for pooling in ("cls", "mean"):
            predicted = predict(
                getattr(known, pooling).to(train.device),
                known.labels.to(train.device),
                getattr(asked, pooling).to(train.device),
                k=self.k,
                temperature=self.temperature,
            )
            share = top1(predicted.cpu(), asked.labels)
            yield f"top1_{pooling}", share
            yield f"stderr_{pooling}", standard_error(share, len(val))
