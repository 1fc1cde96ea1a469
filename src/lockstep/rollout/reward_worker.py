"""A process that computes rewards and nothing else: ``python -m lockstep.rollout.reward_worker SOCKET_FD``.

Whatever the reward does to it, exit, crash or never return, happens here and not in the trainer, which ends
it then. When the trainer is gone it ends itself, in the middle of a reward too.
"""

import os
import select
import signal
import socket
import sys
import threading

import msgspec

from lockstep.errors import RecipeError
from lockstep.rollout.reward_frames import Answer, Question, Setup, encode, receive, send
from lockstep.rollout.rewards import computed, raised
from lockstep.rollout.tasks import reward_of

FRAME_LIMIT = 1 << 30


def main() -> None:
    """Serve the trainer at the other end until it is gone."""
    peer = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=_end_with_trainer, args=[peer.fileno()], daemon=True).start()
    setup = msgspec.msgpack.decode(receive(peer, FRAME_LIMIT), type=Setup)
    try:
        reward = reward_of(setup.config, setup.seed)
    except RecipeError as error:
        send(peer, encode(Answer(recipe_error=(error.boundary, error.got, error.expected, error.hint))))
        return
    send(peer, encode(Answer()))
    decoder = msgspec.msgpack.Decoder(Question, strict=True)
    while True:
        question = decoder.decode(receive(peer, FRAME_LIMIT))
        try:
            answer = Answer(value=computed(reward, question.completion, question.item))
        except BaseException as error:
            answer = Answer(error=raised(error))
        send(peer, encode(answer))


def _end_with_trainer(descriptor: int) -> None:
    poller = select.poll()
    poller.register(descriptor, select.POLLHUP)
    poller.poll()
    os.killpg(0, signal.SIGKILL)  # its own group: it was started in a session of its own


if __name__ == "__main__":
    try:
        main()
    except (EOFError, ConnectionError):
        sys.exit(0)
