"""Pictures and pages made of plain dicts; knows neither torch nor a model."""

from .figures import FIGURES, draw_figures
from .page import render_page
from .policy_file import policy_source
from .style import shorten

__all__ = ['FIGURES', 'draw_figures', 'policy_source', 'render_page', 'shorten']
