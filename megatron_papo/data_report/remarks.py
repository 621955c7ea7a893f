"""What somebody should know of a data set before a run, in sentences; the console and the page say the same."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_papo.config import Config
from megatron_papo.data_report.findings import DataSurvey, most_common
from megatron_papo.rewards.answers import MAX_ANSWER, kind_of_answer


def headline(survey: DataSurvey) -> str:
    """How many rows there are, and how many of those read can be prompts."""
    read = f"all {survey.num_read}" if survey.num_read == survey.num_rows else f"{survey.num_read} of {survey.num_rows}"
    return f"{read} rows read, {len(survey.good)} good, {len(survey.bad)} bad"


def remarks(config: Config, survey: DataSurvey) -> list[str]:
    """The sentences, the most urgent ones first."""
    parts = (_of_bad_rows, _of_lengths, _of_pictures, _of_answers)
    return [sentence for part in parts for sentence in part(config, survey)]


def kinds_of_answers(survey: DataSurvey) -> list[tuple[str, int]]:
    """(kind, rows), by the first answer of each row."""
    return most_common((kind_of_answer(row.answers[0]) for row in survey.good if row.answers), 20)


def _of_bad_rows(config: Config, survey: DataSurvey) -> Iterator[str]:
    if not survey.bad:
        return
    first = survey.bad[0]
    if survey.verb == "eval" or config.data.on_bad_row == "skip":
        yield f"{_rows(len(survey.bad))} would be left out, the first of them: {first}."
    else:
        yield (
            f"data.on_bad_row=stop: the run would stop at the first bad row that it draws. There "
            f"{_are(len(survey.bad))}; the first in the data set: {first}."
        )
    too_long = sum(bad.reason == "prompt too long" for bad in survey.bad)
    if too_long:
        yield f"{_rows(too_long)} longer than data.max_prompt_tokens={config.data.max_prompt_tokens}."


def _of_lengths(config: Config, survey: DataSurvey) -> Iterator[str]:
    if survey.verb != "train" or not survey.good:
        return
    budget, response = config.train.tokens_per_micro_batch, config.generation.max_response_tokens
    over = sum(row.num_tokens + response > budget for row in survey.good)
    if over:
        yield (
            f"{_rows(over)} with more tokens than train.tokens_per_micro_batch={budget}, once a response of "
            f"generation.max_response_tokens={response} is counted."
        )


def _of_pictures(config: Config, survey: DataSurvey) -> Iterator[str]:
    if survey.good and survey.num_without_pictures:
        share = survey.num_without_pictures / len(survey.good)
        effect = ""
        if survey.verb == "train" and config.loss.perception_coef:
            effect = "; the perception term has nothing to work on there"
        yield f"{_rows(survey.num_without_pictures)} ({share:.1%} of the good ones) without a picture{effect}."
    least, most = survey.pixel_bounds
    shrunk, grown = (sum(pixels > most for pixels in survey.pixels), sum(pixels < least for pixels in survey.pixels))
    for number, how, key, bound in ((shrunk, "reduced", "max_pixels", most), (grown, "enlarged", "min_pixels", least)):
        if number:
            yield f"{number} of {len(survey.pixels)} pictures are {how} for the model, by data.{key}={bound}."
    if survey.num_repeated:
        yield f"{_rows(survey.num_repeated)} with the same question and pictures as an earlier row."


def _of_answers(config: Config, survey: DataSurvey) -> Iterator[str]:
    answered = [row for row in survey.good if row.answers]
    long = sum(all(len(answer) > MAX_ANSWER for answer in row.answers) for row in answered)
    if long and config.reward.function is None:
        yield (
            f"{_rows(long)} whose answer has more than {MAX_ANSWER} letters: no \\boxed{{}} of a response is read that "
            "far, so no response would be right."
        )
    if len(answered) > 1:
        (_, number), *_ = most_common((row.answers[0] for row in answered), 1)
        if number > len(answered) / 2:
            yield f"{number / len(answered):.0%} of the rows have the same answer."


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number} rows"


def _are(number: int) -> str:
    return "is 1 bad row" if number == 1 else f"are {number} bad rows"
