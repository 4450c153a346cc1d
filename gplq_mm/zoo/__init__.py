"""The model zoo: runs of configs, what they have measured, and the tables made from it."""

from .collect import Told, collect
from .files import ZooError
from .jobs import Job, Outcome, Report, plan_jobs
from .launch import Line, RunFailedError, follow, shown, train_command
from .metafile import Zoo, final_stage, load_zoo, put_entry
from .pages import check_pages, write_pages
from .runs import run_jobs

__all__ = [
    'Job',
    'Line',
    'Outcome',
    'Report',
    'RunFailedError',
    'Told',
    'Zoo',
    'ZooError',
    'check_pages',
    'collect',
    'final_stage',
    'follow',
    'load_zoo',
    'plan_jobs',
    'put_entry',
    'run_jobs',
    'shown',
    'train_command',
    'write_pages',
]
