"""Packed models: conversion in memory, files, loading."""

from ..layers.int4_weight import DeployError
from .architecture import encode
from .convert import DeployReport, convert
from .export import SizeReport, save
from .load import load

__all__ = ['DeployError', 'DeployReport', 'SizeReport', 'convert', 'encode', 'load', 'save']
