"""What the package knows of a model family, and where it is looked up.

Layers are found by what they are. What a model computes between them stands in its code, so it is
written down by the class's name in full (``'package.module.Class'``): no package of models is
imported here, and a model is never traced.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from ..registry import FAMILIES, registered


class MlpNames(NamedTuple):
    """Where an MLP of two Linears with a GELU between has its layers.

    Attributes:
        first, gelu, second: Names below the module that computes the MLP and nothing beside it.
        inside: Name of that module below the one of the family's table; empty for itself.
    """

    first: str
    gelu: str
    second: str
    inside: str = ''

    @property
    def hidden(self) -> str:
        """Name of the second Linear, which reads the hidden values."""
        return f'{self.inside}.{self.second}' if self.inside else self.second


@dataclass(frozen=True)
class AttentionKind:
    """How an attention class multiplies.

    Attributes:
        quantize: ``quantize(module, specs, name)`` makes the module multiply through a
            :class:`.QuantAttention`, its direct child, in place; ``specs`` (operand -> spec or
            None) and ``name`` are handed on to that.
        pack: ``pack(module)`` makes the quantized module compute with an :class:`.Int4Attention`
            in place and returns None, or returns why it stays a simulation. None: it has no
            packed form.
    """

    quantize: Callable[[nn.Module, dict, str], None]
    pack: Callable[[nn.Module], str | None] | None = None


@dataclass(frozen=True)
class Library:
    """How a packed file names a model of a package that has no registry.

    Attributes:
        describe: ``describe(model)`` gives plain data that :attr:`build` makes the same float
            network of, or None where the model does not tell all of it.
        build: ``build(data)`` makes it, with random weights. The data may come from a file of
            anyone: nothing is unpickled or fetched, and no code is named but known classes.
    """

    describe: Callable[[nn.Module], dict | None]
    build: Callable[[dict], nn.Module]


class Family:
    """Base of the families. Every attribute is a table by class name in full, and may be empty.

    A subclass is a :data:`gplq_mm.registry.FAMILIES` entry; of two that know a class, the one
    registered last counts.

    Attributes:
        attentions: Attention class -> :class:`AttentionKind`.
        blocks: Residual block, one tensor in and one out -> channel axis of both, -1 for tokens,
            1 for feature maps. What compensation, Stage 2 and checkpointing go by.
        mlps: Class with an MLP -> :class:`MlpNames`: where its layers are.
        fused: Class -> ``fuse(module)`` that gives it a fused forward of packed layers, in place,
            and returns whether there was anything to fuse.
        same_as: Class -> class of torch whose forward it has, :class:`torch.nn.LayerNorm` or
            :class:`torch.nn.GELU`.
        ends: Class of a whole model -> names in it of its first layers and of its last, which a
            policy gives 8 bits unless it says otherwise.
        features: Class of a whole model -> function of it that gives the layer with the features
            to mimic (:class:`gplq_mm.models.feature_tap.FeatureTap`), or None.
        outputs: Class of a whole model -> function of it that gives what the analysis compares: a
            callable from a preprocessed batch to named groups of tensors.
        headlines: Metric of a data set's evaluator -> its name in the summary, and the factor that
            makes it percent or AP points.
        scopes: Package whose registry a packed file may name -> regular expression of its modules
            whose classes are built from a file, without the package's name. Those of other
            modules may read what their config names.
        libraries: Package without a registry -> :class:`Library`.
    """

    attentions: Mapping[str, AttentionKind] = {}
    blocks: Mapping[str, int] = {}
    mlps: Mapping[str, MlpNames] = {}
    fused: Mapping[str, Callable[[nn.Module], bool]] = {}
    same_as: Mapping[str, type[nn.Module]] = {}
    ends: Mapping[str, tuple[str, ...]] = {}
    features: Mapping[str, Callable[[nn.Module], nn.Module | None]] = {}
    outputs: Mapping[str, Callable[[nn.Module], Callable]] = {}
    headlines: Mapping[str, tuple[str, float]] = {}
    scopes: Mapping[str, str] = {}
    libraries: Mapping[str, Library] = {}


# What a subclass is as well. How it computes may differ.
INHERITED = ('blocks', 'ends', 'features', 'outputs')


def full_name(cls: type) -> str:
    """Module and name of a class."""
    return f'{cls.__module__}.{cls.__qualname__}'


def families() -> list[type[Family]]:
    """All registered families."""
    return list(registered(FAMILIES).values())


def entry_of(module: nn.Module, table: str) -> Any | None:
    """What the families say of a module.

    Args:
        module: Any module.
        table: Attribute of :class:`Family`. Blocks and whole models count with their subclasses,
            all else is of exactly the named class, since a subclass may compute something else.

    Returns:
        The entry, or None.
    """
    for cls in type(module).__mro__ if table in INHERITED else [type(module)]:
        name = full_name(cls)
        for family in reversed(families()):
            if name in (entries := getattr(family, table)):
                return entries[name]
    return None


def headlines() -> dict[str, tuple[str, float]]:
    """Headline metrics of all families, see :class:`Family`."""
    return {key: value for family in families() for key, value in family.headlines.items()}


def libraries() -> dict[str, Library]:
    """Packages without a registry whose models a packed file may name."""
    return {key: value for family in families() for key, value in family.libraries.items()}


def scopes() -> dict[str, str]:
    """Those of mmengine, of all families (see :class:`Family`) and of this package."""
    named = {scope: modules for family in families() for scope, modules in family.scopes.items()}
    return {'mmengine': r'model\.', **named, 'gplq_mm': r'models\.simple_feature_pyramid$'}


_classes: dict[tuple[type, type], type] = {}


def with_mixin(module: nn.Module, mixin: type) -> bool:
    """Puts ``mixin`` in front of the module's class, in place: hooks, children and keys stay.

    The class keeps its name, so that it is still found by it.

    Returns:
        False if it was there already.
    """
    cls = type(module)
    if issubclass(cls, mixin):
        return False
    if (mixin, cls) not in _classes:
        space = {'__module__': cls.__module__, '__qualname__': cls.__qualname__}
        _classes[mixin, cls] = type(cls.__name__, (mixin, cls), space)
    module.__class__ = _classes[mixin, cls]
    return True
