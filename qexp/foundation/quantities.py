"""The quantities that results are made of, with the values that they can have.

They are the types of fields of results. A result that is read back, from MLflow or from a file, is held against them
(`from_json` in files.py); one that is computed is not.
"""

from typing import Annotated

from pydantic import Field

Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Points = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]  # a difference of two percentages
Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=10**15, allow_inf_nan=False)]
Timed = Annotated[float, Field(gt=1e-12, le=1e12, allow_inf_nan=False)]  # never 0, in any unit
Factor = Annotated[float, Field(gt=1e-140, le=1e140, allow_inf_nan=False)]  # a ratio of two of them
Number = Annotated[int, Field(ge=0, le=10**18)]
Some = Annotated[int, Field(ge=1, le=10**18)]  # of something without which there is no result
Images = Annotated[float, Field(ge=0, le=10**15, allow_inf_nan=False)]  # a sum of parts of images, where labels tie
