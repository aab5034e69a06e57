"""What a rank imports, done once: the ranks that `launch.forked` starts are forked from a process with this module."""

from launcher.imports import quick_imports
from seqaware.engine.ranks import prepare_environment

prepare_environment()
with quick_imports():
    import peft
    import torch._inductor.compile_fx

    import seqaware.engine.operator_cache
    import seqaware.training.run
    import seqaware.training.verify.run

# For scripts that use DeepSpeed without our engine.
seqaware.engine.operator_cache.build_each_once()
__all__ = ["peft", "seqaware", "torch"]
