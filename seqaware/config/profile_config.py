"""The section logging.profile: which steps torch's profiler looks at."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from seqaware.config.values import Count, Section


class ProfileConfig(Section):
    """Steps whose kernels and calls torch's profiler records, on rank 0."""

    # `from` is a word of Python; it is read, shown and written as it stands in the YAML.
    model_config = ConfigDict(serialize_by_alias=True)

    first: Count = Field(default=10, alias="from")
    """The first optimizer step that is recorded; take one after the warm-up of caches and compilers."""
    steps: Annotated[Count, Field(le=100)] = 3
    """How many steps are recorded, into profile/ in the run's folder. What is recorded lies in memory until then."""
