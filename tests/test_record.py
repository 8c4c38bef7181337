import json

import pytest
import record


def bench(provider, median, **info):
    cell = {"shape": "N8", "dtype": "float32", "device": "cpu", "threads": 2, "flops": 2_000_000, "bytes": 1_000_000}
    run = {"machine": "AMD EPYC (TM)", "commit": "abc", "torch": "2.13.0", "triton": "3.9.0"}
    stats = {"median": median, "min": median / 2, "iqr": 1e-5, "rounds": 5}
    return {"extra_info": {"op": "project_rows", "provider": provider} | cell | run | info, "stats": stats}


def test_one_file_for_each_op_and_machine():
    raw = {"benchmarks": [bench("naive", 4e-3), bench("ours", 1e-3), bench("ours", 1e-3, op="score_block")]}
    files = record.compact(raw)
    assert set(files) == {"project_rows-amd-epyc-tm.json", "score_block-amd-epyc-tm.json"}
    naive, ours = files["project_rows-amd-epyc-tm.json"]["rows"]
    assert "speedup" not in naive
    assert ours["speedup"] == 4
    assert (ours["median_us"], ours["gflops"], ours["gbytes_per_s"]) == (1000, 2, 1)


def test_no_speedup_without_the_same_cell_of_the_naive_composition():
    raw = {"benchmarks": [bench("naive", 4e-3, shape="N9"), bench("ours", 1e-3)]}
    rows = record.compact(raw)["project_rows-amd-epyc-tm.json"]["rows"]
    assert all("speedup" not in row for row in rows)


def test_a_speed_up_measured_in_turn_is_taken():
    raw = {"benchmarks": [bench("naive", 4e-3), bench("ours", 1e-3, interleaved={"naive": 3.5})]}
    assert record.compact(raw)["project_rows-amd-epyc-tm.json"]["rows"][1]["speedup"] == 3.5


def test_other_benchmarks_are_left_alone():
    assert record.compact({"benchmarks": [{"extra_info": {"op": "logging"}, "stats": {}}]}) == {}


def test_text_is_json_with_one_line_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps({"benchmarks": [bench("naive", 4e-3), bench("ours", 1e-3)]}))
    record.main(str(raw))
    written = (tmp_path / "results" / "project_rows-amd-epyc-tm.json").read_text()
    assert json.loads(written) == record.compact(json.loads(raw.read_text()))["project_rows-amd-epyc-tm.json"]
    assert sum('"provider"' in line for line in written.splitlines()) == 2


@pytest.mark.parametrize("machine", ["AMD EPYC 9V74 80-Core", "NVIDIA H200"])
def test_file_names_are_plain(machine):
    assert set(record.slug(machine)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
