import torch

from tasks.launch import in_process
from tasks.launch.calls import StageCall
from tasks.launch.in_process import InProcess


def test_the_most_memory_that_a_stage_took_is_measured_where_there_is_a_gpu(monkeypatch, tmp_path):
    peaks = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", peaks.clear)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: max(peaks))
    monkeypatch.setattr(
        in_process, "do", lambda call, resources, out: peaks.append(call.num_cases) or {"images": 3}
    )
    answers = [
        InProcess(None).run(StageCall("evaluate", {}, num_cases=used), tmp_path)
        for used in (3 * 2**30, 2**29)
    ]
    assert [answer.cost for answer in answers] == [{"gpu_peak_gib": 3.0}, {"gpu_peak_gib": 0.5}]
    assert answers[1].meta == {"images": 3}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert InProcess(None).run(StageCall("evaluate", {}, num_cases=1), tmp_path).cost == {}
