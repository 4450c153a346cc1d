"""Packed models: conversion in memory, files, loading."""

from ..layers.int4_weight import DeployError
from .convert import DeployReport, convert

__all__ = ['DeployError', 'DeployReport', 'convert']
