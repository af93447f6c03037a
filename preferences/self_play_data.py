"""The data of self-play (SPIN as published): conversations whose last message is the response to learn."""

from verl.utils.dataset.rl_dataset import RLHFDataset


class SelfPlayDataset(RLHFDataset):
    """Rows of a `real` column: a list of chat messages of which the last is the response to learn.

    The column is `data.prompt_key`; others (SPIN's published data has `generated`) are not read.
    """

    def maybe_filter_out_long_prompts(self, dataframe=None):
        """Splits the messages into prompt and response before verl measures the prompts."""
        split = dataframe.map(
            lambda row: split_conversation(row[self.prompt_key], self.prompt_key),
            remove_columns=[name for name in dataframe.column_names if name != "extra_info"],
            keep_in_memory=True,
        )
        return super().maybe_filter_out_long_prompts(split)


def split_conversation(messages: list[dict], prompt_key: str) -> dict:
    """A row as verl's agent and reward loop want it: the prompt's messages, and the last one's text as ground truth."""
    return {
        prompt_key: messages[:-1],
        "data_source": "self_play",
        "reward_model": {"style": "rule", "ground_truth": messages[-1]["content"]},
    }


def compute_score(data_source, solution_str: str, ground_truth: str, extra_info=None, **kwargs) -> dict[str, float]:
    """1 where the model gives the data's response word for word; a measure only, no preference depends on it."""
    same = float(solution_str.strip() == ground_truth.strip())
    return {"score": same, "acc": same}
