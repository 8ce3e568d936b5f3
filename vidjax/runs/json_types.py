"""Defines types of JSON values with a limited range, for the classes in `schemas` and `facts`."""

import sys
from typing import Annotated

from msgspec import Meta

LOWEST_FLOAT = -sys.float_info.max  # NaN is not `>= LOWEST_FLOAT`
Text = Annotated[str, Meta(max_length=10_000)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Whole = Annotated[int, Meta(gt=-(1 << 53), lt=1 << 53)]
Count = Annotated[int, Meta(ge=0, lt=1 << 31)]
Size = Annotated[int, Meta(ge=1, lt=1 << 31)]
Share = Annotated[float, Meta(ge=0, le=1)]
NotNaN = Annotated[float, Meta(ge=LOWEST_FLOAT)]
