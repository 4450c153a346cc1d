"""Packed models: conversion in memory, files, loading."""

from ..layers.int4_weight import DeployError
from .architecture import encode
from .convert import DeployReport, convert
from .load import load
from .save import SizeReport, save

__all__ = ['DeployError', 'DeployReport', 'SizeReport', 'convert', 'encode', 'load', 'save']
