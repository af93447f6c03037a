"""A source of preferences that asks vLLM while it has the reference's weights, and tells what it answered."""

import zlib

from recipe.spin.preferences.source import Group, PreferenceSource, Score

GREEDY = {"temperature": 0.0, "max_tokens": 12}


class ReferenceSays(PreferenceSource):
    """Scores by length; the metric `reference/says` stands for the reference's greedy answer to one and the same."""

    scoring_model = "reference"

    async def score_group(self, group: Group) -> list[Score]:
        asked = self.tokenizer.encode("train 0", add_special_tokens=False)
        said = zlib.crc32(repr(list(await group.generate(asked, GREEDY))).encode()) % 100003
        return [Score(len(text) + 0.1 * number, {"says": said}) for number, text in enumerate(group.responses)]

    def metrics(self, infos: list[dict]) -> dict[str, float]:
        (said,) = {info["says"] for info in infos}
        return {"reference/says": said}
