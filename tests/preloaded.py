"""What a rank imports, done once: the ranks that `launch.forked` starts are forked from a process with this module."""

from launcher.imports import quick_imports
from seqaware.distributed.process_group import prepare_environment

prepare_environment()
with quick_imports():
    import peft
    import torch._inductor.compile_fx

    import seqaware.training.launch
    import seqaware.verify.verification

__all__ = ["peft", "seqaware", "torch"]
