"""Damaged files are read or refused with one line, in bounded memory: a few of each kind; `make fuzz` has 100,000."""

import json
import random

import pytest
from support import fuzz
from support.fuzz_readers import READERS

COUNT = 12  # files of each kind


def test_damaged_files_are_read_or_refused(tmp_path):
    cases = [(name, number) for name in READERS for number in range(COUNT)]
    assert fuzz.run(cases, tmp_path) == []


@pytest.mark.parametrize("name", READERS)
def test_damage_is_a_function_of_reader_and_number(name):
    files = [fuzz.damaged_file(name, number) for number in range(COUNT)]
    assert files == [fuzz.damaged_file(name, number) for number in range(COUNT)]
    sound = fuzz.sound_files(name)
    assert sum(content != sound[path] for path, content in files) > 0.8 * COUNT


def test_the_header_of_a_safetensors_file_is_damaged_as_json():
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(4)
    for number in range(20):
        changed = fuzz.mutate_json(content, random.Random(number))
        size = int.from_bytes(changed[:8], "little")
        json.loads(changed[8 : 8 + size])
        assert changed[8 + size :] == bytes(4)
