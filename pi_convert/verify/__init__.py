"""The proof that an artifact is its source with the expected RoPE: five links, one verdict."""

from pi_convert.verify.chain import verify
from pi_convert.verify.request import VerifyRequest
from pi_convert.verify.verdict import LinkName, LinkResult, Outcome, Status, Verdict

__all__ = [
    "LinkName",
    "LinkResult",
    "Outcome",
    "Status",
    "Verdict",
    "VerifyRequest",
    "verify",
]
