"""Workloads: what the commands train, built in or the user's own."""

from gradfold.workloads.registry import BUILT_IN as BUILT_IN
from gradfold.workloads.registry import Description as Description
from gradfold.workloads.registry import describe as describe
from gradfold.workloads.registry import load as load
from gradfold.workloads.registry import names as names
from gradfold.workloads.workload import Workload as Workload

__all__ = ["BUILT_IN", "Description", "Workload", "describe", "load", "names"]
