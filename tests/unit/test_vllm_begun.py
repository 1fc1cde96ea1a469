"""Before an update that keeps caches every request has its first token; others wait."""

import asyncio
from types import SimpleNamespace

from lockstep.engines.worker.vllm_begun import FirstTokens


class Processor:
    """vLLM's, as far as it is asked: states by vLLM's names, and a call a step."""

    def __init__(self):
        self.request_states = {}

    def process_outputs(self, first_tokens):
        for name in first_tokens:
            self.request_states[name].is_prefilling = False
        return len(first_tokens)

    def add(self, *names):
        self.request_states |= {name: SimpleNamespace(is_prefilling=True) for name in names}


async def turns(n=3):
    for _ in range(n):
        await asyncio.sleep(0)


def test_an_update_waits_for_the_first_token_of_every_sample_and_requests_for_the_update():
    async def scenario():
        processor = Processor()
        begun = FirstTokens(processor)
        log = []

        async def update():
            async with begun.all_begun():
                log.append("update")
                await turns()
                log.append("updated")

        async def late():
            await begun.let_in("r3")
            log.append("r3")

        await begun.let_in("r1")
        await begun.let_in("r2")
        processor.add("0_r1-a7", "1_r1-a7")
        tasks = [asyncio.create_task(update())]
        await turns()
        tasks.append(asyncio.create_task(late()))
        await turns()
        assert processor.process_outputs(["0_r1-a7"]) == 1
        await turns()
        processor.add("r2-b1")  # let in before, known to the engine only now
        processor.process_outputs(["1_r1-a7"])
        await turns()
        assert log == []
        processor.process_outputs(["r2-b1"])
        await asyncio.wait_for(asyncio.gather(*tasks), 5)
        return log

    assert asyncio.run(scenario()) == ["update", "updated", "r3"]


def test_a_request_that_ends_or_fails_holds_up_no_update():
    async def scenario():
        begun = FirstTokens(Processor())
        await begun.let_in("r1")

        async def update():
            async with begun.all_begun():
                return True

        task = asyncio.create_task(update())
        await turns()
        assert not task.done()
        begun.left("r1")
        begun.left("never let in")
        return await asyncio.wait_for(task, 5)

    assert asyncio.run(scenario())
