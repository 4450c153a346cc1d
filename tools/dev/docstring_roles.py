"""griffe extension: roles of our docstrings (``:class:`X```) become links of the site.

A name is looked up as Python would from where it stands, then among everything that the package
defines. What the site does not show becomes plain code.
"""

import re
from collections.abc import Iterator

import griffe

ROLE = re.compile(r':(?:class|func|meth|mod|attr|data):`([^`]+)`')


def objects_of(root: griffe.Module) -> Iterator[griffe.Object]:
    """Everything that a package defines, itself included."""
    yield root
    for member in root.members.values():
        if not member.is_alias:
            yield from objects_of(member)


class RoleLinks(griffe.Extension):
    """Rewrites the docstrings of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        found = list(objects_of(pkg))
        self.paths = {item.path for item in found}
        for item in found:
            if item.docstring is not None:
                item.docstring.value = ROLE.sub(
                    lambda match, item=item: self.link(match.group(1), item), item.docstring.value
                )

    def link(self, name: str, item: griffe.Object) -> str:
        """``name``, as it stands in the docstring of ``item``, as a link if it can be found."""
        shown = name.lstrip('.')
        for path in self.candidates(name, item):
            if path in self.paths:
                # `optional`: no warning where the site has no place for it.
                return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
        return f'`{shown}`'

    def candidates(self, name: str, item: griffe.Object) -> Iterator[str]:
        """Full paths that a name may mean, the likeliest first."""
        package = item.module if item.module.is_init_module else item.module.parent
        if name.startswith('.'):
            yield package.path + name
            return
        yield name
        scope = item
        while scope is not None:
            yield f'{scope.path}.{name}'
            scope = scope.parent
        yield from sorted(path for path in self.paths if path.endswith(f'.{name}'))
