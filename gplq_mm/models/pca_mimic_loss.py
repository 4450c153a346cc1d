"""PCA feature mimicking: the loss that keeps the student in the teacher's basin."""

import math

import torch
from torch import Tensor, nn

from ..errors import DataError, SettingError, StateError
from ..registry import MODELS


def feature_rows(features: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """Feature vectors of images, or of the places of every level of a pyramid.

    Args:
        features: ``(N, D)``, tokens ``(N, T, D)``, or a map or several ``(N, D, H, W)``.

    Returns:
        For every level a matrix ``(rows, D)``.
    """
    levels = (features,) if torch.is_tensor(features) else features
    return [
        (level.permute(0, 2, 3, 1) if level.dim() == 4 else level).flatten(0, -2)
        for level in levels
    ]


@MODELS.register_module()
class PCAMimicLoss(nn.Module):
    """``1/N sum_i || (f_s,i - mu_t) V - (f_t,i - mu_t) V ||^2`` (GPLQ, eq. 5).

    ``mu_t`` and ``V`` are mean and leading principal components of the teacher's penultimate
    features. The buffers have their final shapes from the start; unused columns of ``V`` are
    zero.

    Of a detector the features are the maps of its pyramid. Every place of a map counts as a
    sample, all levels share one basis, since the heads that read them share their weights, and
    the loss is the mean over the levels, so that the finest one does not outweigh the others.

    Args:
        dim: Width D of the features.
        loss_weight: The paper's alpha. Defaults to 1.0.
        explained: Share of variance that the components must explain, unless
            ``num_components`` is given. Defaults to 0.6.
        multiple: The number of components is rounded up to a multiple of this (never above D).
        num_components: Fixed number of components.

    Raises:
        SettingError: For settings outside their range.
    """

    def __init__(
        self,
        dim: int,
        loss_weight: float = 1.0,
        explained: float = 0.6,
        multiple: int = 32,
        num_components: int | None = None,
    ):
        super().__init__()
        if not 0 < explained <= 1:
            raise SettingError(f'mimic.explained={explained} must lie in (0, 1].')
        if multiple < 1:
            raise SettingError(f'mimic.multiple={multiple} must be at least 1.')
        if num_components is not None and not 1 <= num_components <= dim:
            raise SettingError(
                f'mimic.num_components={num_components} must lie in 1..{dim}, the feature width.'
            )
        self.dim = dim
        self.loss_weight = loss_weight
        self.explained = explained
        self.multiple = multiple
        self.fixed_components = num_components
        self.register_buffer('mean', torch.zeros(dim))
        self.register_buffer('components', torch.zeros(dim, dim))
        self.register_buffer('num_components', torch.zeros((), dtype=torch.int64))

    @property
    def is_fitted(self) -> bool:
        """Whether the basis is there."""
        return int(self.num_components) > 0

    @torch.no_grad()
    def fit(self, mean: Tensor, covariance: Tensor) -> dict:
        """Sets the basis.

        Args:
            mean: Mean teacher feature ``(D,)``.
            covariance: ``(D, D)``.

        Returns:
            ``num_components``, ``explained_variance`` (share of the kept components) and
            ``spectrum`` (share of every component, descending).

        Raises:
            DataError: If the features do not vary.
        """
        values, vectors = torch.linalg.eigh(covariance.double())
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        total = values.sum()
        if not bool(total > 0):
            raise DataError(
                'the teacher gives the same features for all images; check its weights.'
            )
        share = values / total
        count = self.fixed_components
        if count is None:
            needed = int((share.cumsum(0) < self.explained - 1e-12).sum()) + 1
            count = min(self.dim, math.ceil(needed / self.multiple) * self.multiple)
        # The sign of an eigenvector is arbitrary; fixing it makes the basis reproducible.
        kept = vectors[:, :count]
        kept = kept * kept.gather(0, kept.abs().argmax(0, keepdim=True)).sign()
        self.mean.copy_(mean)
        self.components.zero_()
        self.components[:, :count] = kept.to(self.components)
        self.num_components.fill_(count)
        return {
            'num_components': count,
            'explained_variance': float(share[:count].sum()),
            'spectrum': share.tolist(),
        }

    def forward(
        self, student: Tensor | tuple[Tensor, ...], teacher: Tensor | tuple[Tensor, ...]
    ) -> Tensor:
        """Scalar loss, ``loss_weight`` included.

        Args:
            student: Features ``(N, D)``, or a map or several ``(N, D, H, W)``, with gradient.
            teacher: Features of the same shapes.

        Raises:
            StateError: Before :meth:`fit`.
        """
        if not self.is_fitted:
            raise StateError('PCAMimicLoss has no basis; add the PCABasisHook to the config.')
        basis = self.components[:, : int(self.num_components)]
        pairs = list(zip(feature_rows(student), feature_rows(teacher), strict=True))
        # mu_t cancels in the difference.
        losses = [((a.float() - b.float()) @ basis).square().sum(1).mean() for a, b in pairs]
        return self.loss_weight * torch.stack(losses).mean()
