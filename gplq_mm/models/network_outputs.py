"""What a network gives for a batch, such that two of its states can be compared value by value."""

from functools import partial

from torch import Tensor

from ..errors import SettingError
from ..layers.family import entry_of
from .feature_tap import FeatureTap, feature_layer_of, tapped_outputs
from .gplq import GPLQ


class NetworkOutputs:
    """Callable on a preprocessed batch; gives groups of tensors.

    Of a classifier they are ``'features'``, the input of its last Linear, and ``'logits'``; of
    another model what its family says (:attr:`gplq_mm.layers.Family.outputs`).

    Args:
        model: Classifier, or a model of a family with outputs, such as a detector.

    Raises:
        SettingError: If it is neither, or a detector whose head reads more than maps (DETR).
    """

    def __init__(self, model: GPLQ):
        self.model, self.tap = model.architecture, None
        build = entry_of(self.model, 'outputs')
        self._outputs = None if build is None else build(self.model)
        if build is None:
            if getattr(self.model, 'head', None) is None:
                raise SettingError(
                    'the analysis compares the outputs of classifiers and detectors, and the '
                    'architecture has neither a head nor a known class of detectors.'
                )
            # Not the layer that a config may name for mimicking: what follows it would be left out.
            self.tap = FeatureTap(feature_layer_of(self.model, None))

    @property
    def is_detector(self) -> bool:
        """Whether the network is a detector."""
        return self.tap is None

    def __call__(self, batch: dict) -> dict[str, list[Tensor]]:
        """Outputs for a batch ``dict(inputs=..., data_samples=...)`` of the preprocessor."""
        if self._outputs is not None:
            return self._outputs(batch)
        run = partial(self.model, batch['inputs'], mode='tensor')
        feature, logits = tapped_outputs(self.tap, run)
        return {'features': [feature], 'logits': [logits]}
