"""The thread that makes the engine, runs its steps and closes it. It takes commands from a queue and posts events."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from moe_runtime.serve.engine_messages import (
    AbortRequest,
    Accepted,
    AddRequest,
    Answer,
    Close,
    Command,
    Died,
    Event,
    Loaded,
    LoadFailed,
    Query,
    Refused,
    ResetPrefixCache,
    StartRebalance,
    Stepped,
)
from moe_runtime.wire.executor import RankError

if TYPE_CHECKING:
    from moe_runtime.balancer.live.mover import Rebalance
    from moe_runtime.engine.engine import Engine

IDLE_CHECK_SECONDS = 0.5  # how often an idle engine checks that its ranks are alive
MIGRATION_CHECK_SECONDS = 0.002  # the same while experts move

logger = logging.getLogger(__name__)


class EngineThread(threading.Thread):
    """Owns the engine. Only this thread makes, steps and closes it.

    It is a daemon thread: it cannot be ended from outside while it loads or runs a step, and it must not keep the
    process alive.

    Args:
        make_engine: may raise ValueError for the user's mistakes, and RankError.
        post: takes every event, in order; called in this thread.
    """

    def __init__(self, make_engine: Callable[[], Engine], post: Callable[[Event], None]) -> None:
        super().__init__(name="engine", daemon=True)
        self._make_engine = make_engine
        self._post = post
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._rebalances: dict[int, Rebalance] = {}  # running ones, by the id of the query that waits

    def send(self, command: Command) -> None:
        """Queue a command; the thread takes it before its next step."""
        self._commands.put(command)

    def run(self) -> None:
        engine = self._load()
        if engine is None:
            return
        try:
            self._work(engine)
        except RankError as error:
            self._post(Died(str(error)))
        except Exception as error:  # after any error, the requests must be told and the server must end
            logger.exception("the engine failed")
            self._post(Died(f"{type(error).__name__}: {error}"))
        finally:
            engine.close()

    def _load(self) -> Engine | None:
        try:
            engine = self._make_engine()
            engine.warm_up()
        except (ValueError, RankError) as error:
            self._post(LoadFailed(str(error), isinstance(error, ValueError)))
        except Exception as error:  # after any error, the server must end and say why
            logger.exception("the engine could not be made")
            self._post(LoadFailed(f"{type(error).__name__}: {error}", False))
        else:
            model = engine.model_config
            defaults = dict(model.default_sampling)
            health = engine.health()
            self._post(
                Loaded(
                    engine.config,
                    engine.rules,
                    engine.tokenizer,
                    defaults,
                    model.family,
                    health,
                    engine.stats(),
                    engine.grammars,
                )
            )
            return engine
        return None

    def _work(self, engine: Engine) -> None:
        while self._take_commands(engine):
            if engine.has_work:
                deltas = engine.step()
            else:
                engine.tend()
                deltas = []
            self._post(Stepped(deltas, engine.stats()))
            self._answer_rebalances()

    def _take_commands(self, engine: Engine) -> bool:
        """Run all queued commands; without work, wait for one. False once the engine is to close."""
        try:
            timeout = MIGRATION_CHECK_SECONDS if engine.is_migrating else IDLE_CHECK_SECONDS
            command = self._commands.get(block=not engine.has_work, timeout=timeout)
            while not isinstance(command, Close):
                self._do(engine, command)
                command = self._commands.get_nowait()
        except queue.Empty:
            return True
        return False

    def _answer_rebalances(self) -> None:
        for query_id, rebalance in list(self._rebalances.items()):
            if rebalance.done:
                self._post(Answer(query_id, rebalance.to_dict()))
                del self._rebalances[query_id]

    def _do(
        self, engine: Engine, command: AddRequest | AbortRequest | Query | StartRebalance | ResetPrefixCache
    ) -> None:
        match command:
            case AddRequest(request_id, prompt, params, user, shown_ids, cache_salt, arrived_at):
                try:
                    engine.add_request(request_id, prompt, params, user, shown_ids, cache_salt, arrived_at)
                except ValueError as error:
                    self._post(Refused(request_id, str(error)))
                else:
                    self._post(Accepted(request_id))
            case AbortRequest(request_id):
                engine.abort(request_id)
            case Query(query_id, "expert_load"):
                self._post(Answer(query_id, engine.expert_load()))
            case Query(query_id, "placement"):
                self._post(Answer(query_id, engine.placement()))
            case Query(query_id, "decisions"):
                self._post(Answer(query_id, engine.decisions()))
            case ResetPrefixCache(query_id):
                engine.reset_prefix_cache()
                self._post(Answer(query_id, None))
            case StartRebalance(query_id, dry_run):
                try:
                    self._rebalances[query_id] = engine.rebalance(dry_run)
                except ValueError as error:
                    self._post(Answer(query_id, error))
                self._answer_rebalances()
