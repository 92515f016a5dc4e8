"""What stages exchange: messages of a tick begin together, and what computes comes after all of them."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.pipe import schedule

from fft.training import staged


class Engine:
    """A stage in the middle of three, and what it does."""

    def __init__(self, done):
        def computes(name):
            return lambda self, **given: done.append(name)

        kinds = (schedule.ForwardPass, schedule.BackwardPass, schedule.ReduceTiedGrads)
        self._INSTRUCTION_MAP = {kind: computes(kind.__name__) for kind in kinds}
        self.grid = SimpleNamespace(stage_to_global=lambda stage_id: 10 + stage_id)
        self.prev_stage, self.next_stage, self.device = 0, 2, torch.device("cpu")
        self.dynamic_shape, self.first_output_send = False, True
        self.pipe_recv_buf = self.grad_layer = None
        hidden, bounds = torch.zeros(1, 4, 8), torch.zeros(5, dtype=torch.int32)
        given = hidden.clone().requires_grad_()
        given.grad = torch.ones_like(given)
        self.pipe_buffers = {"inputs": [(given, bounds), None], "outputs": [(hidden, bounds), (hidden, bounds)]}
        self._send_tensor_meta = lambda tensors, stage: done.append(f"shapes to {stage}")
        self._recv_tensor_meta = lambda stage: done.append(f"shapes from {stage}") or (hidden, bounds)
        self._reserve_pipe_buffers = lambda count: None


class Ticks(list):
    def num_pipe_buffers(self):
        return 2


@pytest.fixture
def done(monkeypatch):
    told = []

    def begin(operations):
        told.append([(op.op.__name__, op.peer, str(op.tensor.dtype).removeprefix("torch.")) for op in operations])
        return [SimpleNamespace(wait=lambda: None)]

    monkeypatch.setattr(staged.dist, "P2POp", lambda op, tensor, peer: SimpleNamespace(op=op, tensor=tensor, peer=peer))
    monkeypatch.setattr(staged.dist, "batch_isend_irecv", begin)
    return told


def test_messages_of_a_tick_begin_together(done):
    engine = Engine(done)
    staged.Exchanges(engine)
    ticks = [
        [schedule.SendGrad(0), schedule.RecvActivation(1), schedule.ForwardPass(1)],
        [schedule.RecvGrad(0), schedule.SendActivation(1), schedule.BackwardPass(0)],
        [schedule.SendActivation(0)],  # the last of an evaluation, after which nothing computes
    ]
    engine._exec_schedule(Ticks(ticks))
    states, bounds = "float32", "int32"
    assert done == [
        "shapes from 0",
        [("irecv", 10, states), ("irecv", 10, bounds), ("isend", 10, states)],  # gloo wants receives first
        "ForwardPass",
        "shapes to 2",
        [("irecv", 12, states), ("isend", 12, states), ("isend", 12, bounds)],
        "BackwardPass",
        [("isend", 12, states), ("isend", 12, bounds)],
    ]
    assert engine.pipe_buffers["inputs"][0] is None
    states, bounds = engine.pipe_buffers["inputs"][1]
    assert (states.shape, states.requires_grad, bounds.requires_grad) == ((1, 4, 8), True, False)
    assert [grad.shape for grad in engine.grad_layer] == [(1, 4, 8)]
    assert all(x.is_meta for x in engine.pipe_recv_buf)  # what it had to find out the shapes is not kept


def test_shapes_come_with_every_message_where_they_change(done):
    engine = Engine(done)
    engine.dynamic_shape = True
    staged.Exchanges(engine)
    engine._exec_schedule(Ticks([[schedule.RecvActivation(1)], [schedule.RecvActivation(1)]]))
    assert done.count("shapes from 0") == 2


@pytest.mark.parametrize(("tokens", "ahead"), [(4, 16), ((1 << 19) - 1, 4), (1 << 22, 2)])
def test_an_evaluation_waits_for_several_micro_batches_ahead(tokens, ahead, monkeypatch):
    """Of a stage in the middle, whose messages have ``tokens`` of 8 numbers; they come in the order they were sent."""
    done, under_way = [], {"irecv": 0, "isend": 0}
    most = dict(under_way)

    def begin(operations):
        kind = operations[0].op.__name__
        under_way[kind] += 1
        most[kind] = max(most[kind], under_way[kind])
        number = done.count(kind)
        done.append(kind)

        def wait():
            done.append(f"{kind} {number} over")
            under_way[kind] -= 1

        return [SimpleNamespace(wait=wait)]

    monkeypatch.setattr(staged.dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(staged.dist, "P2POp", lambda op, tensor, peer: SimpleNamespace(op=op, tensor=tensor, peer=peer))
    monkeypatch.setattr(staged.dist, "batch_isend_irecv", begin)
    engine = Engine(done)
    engine.is_first_stage = engine.is_last_stage = lambda: False
    message = torch.empty(1, tokens, 8, device="meta"), torch.empty(5, dtype=torch.int32, device="meta")
    engine.device = torch.device("meta")
    engine.pipe_buffers["outputs"] = [message, message]
    engine._recv_tensor_meta = lambda stage: done.append(f"shapes from {stage}") or message
    staged.Exchanges(engine)
    for _ in range(2):
        done.clear()
        engine._exec_schedule(schedule.InferenceSchedule(micro_batches=40, stages=3, stage_id=1))
        assert [done.count(what) for what in ("irecv", "ForwardPass", "isend")] == [40, 40, 40]
        for kind in most:
            assert [word for word in done if word.startswith(f"{kind} ")] == [f"{kind} {i} over" for i in range(40)]
        assert most == {"irecv": ahead, "isend": ahead + 1}  # one is begun before the oldest is looked after
        assert under_way == {"irecv": 0, "isend": 0}
        before = done[: done.index("ForwardPass")]
        assert before.count("irecv") == ahead
    assert "shapes from 0" not in done  # which are known since the first evaluation
