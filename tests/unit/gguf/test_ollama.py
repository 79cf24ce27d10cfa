"""utils.gguf.ollama: the Modelfile's template, executed as Go does it, writes what the chat template writes."""

import json
import re
import shutil
import subprocess

import pytest

from support.families import make_family
from utils.gguf.ollama import build_modelfile, read_turn_texts
from utils.text.prompts import CHAT_TEMPLATES, SYSTEM_PROMPT, render
from utils.text.tokenizer import load_tokenizer

OTHERS = {
    "chatml": "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama-3": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
}
TEMPLATES = CHAT_TEMPLATES | OTHERS
CONVERSATIONS = [
    [("user", "你好 {x}")],
    [("system", "Be brief."), ("user", "hi")],
    [("user", "a"), ("assistant", "b"), ("user", "c")],
    [("system", "s\n\ns"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]


@pytest.fixture
def tokenizer(base_tokenizer_folder):
    return load_tokenizer(base_tokenizer_folder)


def messages_of(conversation):
    return [{"role": role, "content": content} for role, content in conversation]


def parse_modelfile(text):
    """(template, system, stop words) of a Modelfile."""
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.S)
    system = re.search(r'SYSTEM """(.*?)"""', text, re.S)
    stops = [
        json.loads(line.removeprefix("PARAMETER stop ")) for line in text.splitlines() if "PARAMETER stop" in line
    ]
    return template and template[1], system[1] if system else "", stops


def ollama_messages(conversation, default_system):
    """What Ollama hands to a template: the Modelfile's system message comes first where there is none."""
    messages = messages_of(conversation)
    if default_system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": default_system})
    return messages, "\n\n".join(m["content"] for m in messages if m["role"] == "system")


def execute(template, messages, system):
    """The part of Go's text/template that is used: range, if, else if, else, end, eq, le, fields."""
    tokens = re.split(r"(\{\{.*?\}\})", template, flags=re.S)

    def truth(condition, index, message):
        if condition == "$.System":
            return bool(system)
        if match := re.fullmatch(r'eq \$m\.Role "(\w+)"', condition):
            return message["role"] == match[1]
        match = re.fullmatch(r"le \$i (\d+)", condition)
        return index <= int(match[1])

    def run(index, message):
        output, stack = [], []  # of every open if: [this branch is taken, some branch was]
        for token in tokens:
            if not token.startswith("{{"):
                if all(taken for taken, _ in stack):
                    output.append(token)
                continue
            action = token.strip("{}- ")
            if action.startswith("range "):
                stack.append([True, True])
            elif action.startswith("if "):
                value = truth(action[3:], index, message)
                stack.append([value, value])
            elif action.startswith("else"):
                value = not stack[-1][1] and (action == "else" or truth(action[8:], index, message))
                stack[-1] = [value, stack[-1][1] or value]
            elif action == "end":
                stack.pop()
            elif all(taken for taken, _ in stack):
                output.append({"$.System": system, "$m.Content": message["content"]}[action])
        assert not stack
        return "".join(output)

    return "".join(run(index, message) for index, message in enumerate(messages))


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_writes_what_training_saw(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name]
    template, default, stops = parse_modelfile(build_modelfile("model-F16.gguf", tokenizer))
    for conversation in CONVERSATIONS:
        expected = render(messages_of(conversation), TEMPLATES[name], tokenizer, add_generation_prompt=True)
        # llama.cpp puts the BOS before every prompt itself.
        assert execute(template, *ollama_messages(conversation, default)) == expected.removeprefix("<s>")
    assert "</s>" in stops and all(stops)


def test_known_templates(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATES["alpaca-2"]
    text = build_modelfile("model-Q4_K_M.gguf", tokenizer)
    assert text.startswith('FROM ./model-Q4_K_M.gguf\nTEMPLATE """{{- range')
    _, system, stops = parse_modelfile(text)
    assert (system, stops) == (SYSTEM_PROMPT, ["</s>", "[INST]"])
    tokenizer.chat_template = CHAT_TEMPLATES["llama-2"]
    assert parse_modelfile(build_modelfile("x.gguf", tokenizer))[1:] == ("", ["</s>", "[INST]"])
    tokenizer.chat_template = CHAT_TEMPLATES["alpaca"]
    _, system, stops = parse_modelfile(build_modelfile("x.gguf", tokenizer))
    assert system.startswith("Below is an instruction") and stops == ["</s>", "### Instruction:"]


def test_base_models_get_no_template_put_on_them(tokenizer):
    tokenizer.chat_template = None
    assert build_modelfile("x.gguf", tokenizer) == 'FROM ./x.gguf\nTEMPLATE """{{ .Prompt }}"""\n'


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index ~ m['role'] ~ m['content'] }}{% endfor %}",  # numbered turns
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ '{{' + m['role'] + m['content'] }}{% endfor %}",  # Go would read this as its own
        "{{ messages[-1]['content'] }}",
    ],
)
def test_other_templates_are_left_to_ollama(tokenizer, template, caplog):
    tokenizer.chat_template = template
    text = build_modelfile("x.gguf", tokenizer)
    assert 'TEMPLATE """' not in text
    assert text.startswith("FROM ./x.gguf\n# TEMPLATE is left out")
    assert "Modelfile without TEMPLATE" in caplog.text


def test_a_template_without_bos_is_warned_of(tokenizer, caplog):
    tokenizer.chat_template = OTHERS["chatml"]
    assert read_turn_texts(tokenizer) is not None
    assert "puts <s> before every prompt" in caplog.text


GO = """
package main
import ("encoding/json"; "os"; "strings"; "text/template")
type Message struct{ Role, Content string }
type Case struct{ Template, System string; Messages []*Message }
func main() {
    var cases []Case
    if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
    results := []string{}
    for _, c := range cases {
        var out strings.Builder
        data := map[string]any{"System": c.System, "Messages": c.Messages}
        if err := template.Must(template.New("").Parse(c.Template)).Execute(&out, data); err != nil { panic(err) }
        results = append(results, out.String())
    }
    json.NewEncoder(os.Stdout).Encode(results)
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
def test_go_itself_agrees(tokenizer, tmp_path):
    cases, expected = [], []
    for template in TEMPLATES.values():
        tokenizer.chat_template = template
        text, default, _ = parse_modelfile(build_modelfile("x.gguf", tokenizer))
        for conversation in CONVERSATIONS:
            messages, system = ollama_messages(conversation, default)
            cases.append({"Template": text, "System": system, "Messages": messages})
            written = render(messages_of(conversation), template, tokenizer, add_generation_prompt=True)
            expected.append(written.removeprefix("<s>"))
    (tmp_path / "main.go").write_text(GO)
    done = subprocess.run(
        ["go", "run", "main.go"], cwd=tmp_path, input=json.dumps(cases), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == expected


def test_an_end_that_is_no_special_token_is_a_stop_too(tmp_path, base_tokenizer_folder):
    tokenizer = make_family("ChatML-on-Llama", tmp_path / "tokenizer", base_tokenizer_folder)
    _, _, stops = parse_modelfile(build_modelfile("model-F16.gguf", tokenizer))
    assert stops[:2] == ["</s>", "<|im_end|>"]
