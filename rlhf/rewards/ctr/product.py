"""The product that a CTR model reads: the four columns of an item that it was trained on, as a value that sets can hold."""

from dataclasses import dataclass
from typing import Self

from rlhf.rewards.config import CTRJudgeConfig
from rlhf.rewards.protocols import check_columns
from rlhf.types import Item


@dataclass(frozen=True, kw_only=True)
class Product:
    """Rows of a click log whose products are equal show the same product in different pictures."""

    food_name: str
    food_type: str
    city_name: str
    shop_name: str

    @classmethod
    def of(cls, item: Item) -> Self:
        """The product of an item, whose other columns are not read. Raises: Refused, naming the columns that it lacks."""
        columns = CTRJudgeConfig.item_columns
        check_columns("ctr", columns, item)
        return cls(**{column: item[column] for column in columns})
