"""Pictures and the page of an analysis, made of plain dicts; knows neither torch nor a model."""

from .figures import FIGURES, draw_figures
from .page import render_page
from .style import shorten

__all__ = ['FIGURES', 'draw_figures', 'render_page', 'shorten']
