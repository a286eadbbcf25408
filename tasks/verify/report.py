"""The health report for a person.

Ring: pure.
"""

from typing import Any

from tasks.artifacts import HealthReport


def health_markdown(report: HealthReport, about: dict[str, Any]) -> str:  # Any: manifest values
    """Return verdict, scores and a sample answer."""
    verdict = "PASSED" if report.passed else "FAILED"
    if "pretrained" in about:
        return _whole_markdown(report, about, verdict, "random weights of the same config", _of_pretraining(report))
    if "reinforced" in about:
        return _whole_markdown(report, about, verdict, "the base it began as, by transformers", _of_rewards(about))
    chat = about["chat"]
    return f"""# Verification {verdict}: {report.served_model_name}

| mean log-probability of {report.num_answers} validation answers | nats per token |
|---|---:|
| served, asked from {report.gateway_url} | {report.served_logprob:.4f} |
| merged files, by transformers | {report.merged_logprob:.4f} |
| base, by transformers | {report.base_logprob:.4f} |

Token by token the served model is {report.token_gap:.5f} from the merged files, which the tune moved by \
{report.tuning_gap:.4f}. Served minus merged: {report.served_logprob - report.merged_logprob:+.5f}. \
From the base with the adapter, merged by PEFT, it is {report.adapter_gap:.5f}.

Served minus base: {report.served_logprob - report.base_logprob:+.4f}; training lowered the validation loss by \
{report.trainer_gain:.4f}. Greedy tokens compared: {report.num_greedy_tokens}.

{about.get("failure") or "The served weights are the merged ones, and not the base."} {chat.get("format", "")}

**{chat["question"]}**

> {chat["answer"]}

{chat["seconds"]} s for the whole answer, {chat["first_token_s"]} s to the first streamed piece \
({chat["num_stream_pieces"]} pieces).
{_not_served(chat)}"""


def _of_pretraining(report: HealthReport) -> tuple[str, str]:
    """Return what the training brought, and what a model that passed has shown."""
    fell = f"Training lowered its loss by {report.trainer_gain:.4f}."
    return fell, "The served weights are the published ones, and they were trained."


def _of_rewards(about: dict[str, Any]) -> tuple[str, str]:  # Any: as above
    """The same of a model that was trained with rewards."""
    before, after = ("not measured" if score is None else f"{score:.4f}" for score in about["test_scores"])
    doubt = about["doubt"]
    shown = f"NOT PROVEN by log-probabilities: {doubt}. Its files were compared by their digests." if doubt else ""
    return (
        f"verl's mean test score: {before} before, {after} after.",
        shown or "The served weights are the published ones, and not the base.",
    )


def _whole_markdown(
    report: HealthReport, about: dict[str, Any], verdict: str, beginning: str, said: tuple[str, str]
) -> str:  # Any: as above
    chat, (brought, shown) = about["chat"], said
    return f"""# Verification {verdict}: {report.served_model_name}, {about.get("pretrained") or about["reinforced"]}

| mean log-probability of {report.num_answers} texts | nats per token |
|---|---:|
| served, asked from {report.gateway_url} | {report.served_logprob:.4f} |
| the published files, by transformers | {report.merged_logprob:.4f} |
| {beginning} | {report.base_logprob:.4f} |

Token by token the served model is {report.token_gap:.5f} from its files, which training moved by \
{report.tuning_gap:.4f}. {brought} Greedy tokens compared: {report.num_greedy_tokens}.

{about.get("failure") or shown} {chat.get("format", "")}

**{chat["question"]}**

> {chat["answer"]}

{chat["seconds"]} s for the whole answer, {chat["first_token_s"]} s to the first streamed piece \
({chat["num_stream_pieces"]} pieces).
{_not_served(chat)}"""


def _not_served(chat: dict[str, Any]) -> str:  # Any: as above
    """Say what a client can't ask of a model whose contract is completions."""
    refused = chat.get("not_served")
    if not refused:
        return ""
    said = "".join(f"\n- `{path}`: {reply}" for path, reply in refused.items())
    return (
        "\nIts contract is `/v1/completions`: vLLM reads each chat with a gpt-oss as harmony, whose token ids this "
        f"model's own vocabulary does not have. What it says elsewhere:\n{said}\n"
    )
