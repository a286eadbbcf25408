"""The health report for a person.

Ring: pure.
"""

from typing import Any

from tasks.artifacts import HealthReport


def health_markdown(report: HealthReport, about: dict[str, Any]) -> str:  # Any: manifest values
    """Return verdict, scores and a sample answer."""
    verdict = "PASSED" if report.passed else "FAILED"
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
"""
