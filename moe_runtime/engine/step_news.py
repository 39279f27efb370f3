"""What ranks must learn once, with the first step that needs it: the tokens of the model, for grammars. No torch."""

from __future__ import annotations

from dataclasses import replace

from moe_runtime.grammars.compile import GrammarCompiler
from moe_runtime.wire.messages import StepPlan


class StepNews:
    """Adds to plans what ranks do not know yet.

    Args:
        compiler: makes grammars; None without a tokenizer.
    """

    def __init__(self, compiler: GrammarCompiler | None) -> None:
        self._compiler = compiler
        self._knows_tokens = False

    def add_to(self, plan: StepPlan) -> StepPlan:
        """The plan; the first one with a grammar has the vocabulary for all ranks."""
        if self._knows_tokens or not any(new.grammar for work in plan.ranks for new in work.new_sequences):
            return plan
        assert self._compiler is not None
        self._knows_tokens = True
        vocabulary = self._compiler.vocabulary
        return replace(plan, ranks=[replace(work, vocabulary=vocabulary) for work in plan.ranks])
