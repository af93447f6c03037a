"""Whether several files of data go together: verl joins them, column by column."""

import sys

from recipe.spin.common.settings import Settings


def check_columns(settings: Settings, key: str, files: list[str]) -> None:
    """verl joins the files by datasets.concatenate_datasets, which wants a column to be of one type in all of them."""
    columns: dict[str, list[tuple]] = {}
    for file in files:
        for name, column in _columns(file).items():
            columns.setdefault(name, []).append((file, column))
    for name, found in columns.items():
        bad = next((end for end in range(1, len(found)) if not _can_join(found[: end + 1])), None)
        if bad is None:
            continue
        other = next((one for one in found[:bad] if not _can_join([one, found[bad]])), found[0])
        one_type, other_type = (column.features.arrow_schema.field(name).type for _, column in (found[bad], other))
        settings.require(
            False,
            key,
            f"the column {name!r} is {other_type} in {other[0]!r} and {one_type} in {found[bad][0]!r}, and verl joins "
            "files whose columns are of one type; write them alike",
        )


def _columns(file: str) -> dict:
    """Of each column a dataset with a null, in the type that datasets finds; none of a file that it does not read."""
    from datasets import Dataset, Features, load_dataset

    kind = "parquet" if file.endswith(".parquet") else "json"
    try:
        rows = load_dataset(kind, data_files=file, split="train", streaming=True)  # keeps no copy
        features = rows.features
        if features is None:  # of a JSON array, before it is read
            features = Features.from_arrow_schema(next(rows.with_format("arrow").iter(batch_size=sys.maxsize)).schema)
        types = {name: Features({name: feature}) for name, feature in features.items()}
        return {name: Dataset.from_dict({name: [None]}, features=features) for name, features in types.items()}
    except Exception:  # whatever its readers raise
        return {}


def _can_join(columns: list[tuple]) -> bool:
    from datasets import concatenate_datasets

    try:
        concatenate_datasets([column for _, column in columns])
    except Exception:  # of several kinds
        return False
    return True
