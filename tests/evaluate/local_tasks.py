"""Task files for lm-eval with their data, written by the tests: one of each kind of request."""

import json
from pathlib import Path

CHOICES = [
    {"question": "What is the cat?", "choices": ["It is black.", "One day.", "A dog."], "label": 0},
    {"question": "Tell me a story.", "choices": ["a", "b", "c", "d"], "label": 3},
    {"question": "One day the cat met a dog. " * 8, "choices": ["It is", "What is the cat? It is"], "label": 1},
    {"question": "Naïve 猫:", "choices": ["x", " yy", "z z"], "label": 1},
]
TEXTS = [{"text": "One day the cat met a dog.\n"}, {"text": "Tell me a story. It is black.\n" * 9}, {"text": "猫"}]
QUESTIONS = [{"question": row["question"], "answer": "It is black."} for row in CHOICES]

CHOICE = """
task: local_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: local_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
GENERATION = """
task: local_generation
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {until: ["\\n", "cat"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def write_tasks(folder: Path) -> list[str]:
    """Writes the three tasks and gives their files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, text, rows in (
        ("choice", CHOICE, CHOICES),
        ("rolling", ROLLING, TEXTS),
        ("generation", GENERATION, QUESTIONS),
    ):
        data, file = folder / f"{name}.jsonl", folder / f"{name}.yaml"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        file.write_text(
            f"{text}dataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        )
        files.append(str(file))
    return files
