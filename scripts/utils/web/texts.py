"""The web demo's words in Chinese and English."""

from __future__ import annotations

from collections.abc import Mapping

LANGUAGES = {"zh": "中文", "en": "English"}

# name: (Chinese, English); names in braces are filled in.
TEXTS: dict[str, tuple[str, str]] = {
    "dark": ("🌗 深色", "🌗 Dark"),
    "greeting": (
        "### 有什么可以帮忙的？\n\n问题发送后，回答会逐字出现",
        "### How can I help?\n\nAnswers appear as they are written",
    ),
    "question": ("输入问题，Enter 发送，Shift+Enter 换行", "Type a question. Enter: send, Shift+Enter: new line"),
    "go_on": ("接着写", "Continue"),
    "no_answer": ("还没有回答", "There is no answer yet"),
    "new_chat": ("新对话", "New chat"),
    "save": ("保存", "Save"),
    "load": ("载入", "Load"),
    # side panel
    "prompts": ("提示", "Prompts"),
    "system_prompt": ("系统提示", "System prompt"),
    "system_prompt_hint": ("留空：模板默认的系统提示", "Empty: the template's default"),
    "system_prompt_none": ("留空：没有系统提示", "Empty: no system prompt"),
    "negative_prompt": ("负面提示", "Negative prompt"),
    "negative_prompt_hint": (
        "回答不应该像什么样；引导强度大于 1 时起作用",
        "What answers should not be like; works with a guidance scale above 1",
    ),
    "guidance_scale": ("引导强度", "Guidance scale"),
    "guidance_scale_info": (
        "1 为关闭；大于 1 时远离负面提示，计算量加倍",
        "1: off; above 1: away from the negative prompt, twice the work",
    ),
    "sampling": ("采样", "Sampling"),
    "max_new_tokens": ("回答最多词元数", "Longest answer (tokens)"),
    "temperature": ("温度", "Temperature"),
    "temperature_info": (
        "越小越保守，0 为每次取最可能的词元",
        "Lower is more cautious; 0: always the likeliest token",
    ),
    "top_p": ("top-p", "Top-p"),
    "top_p_info": (
        "只从累计概率达到它的词元里抽，1 为不限",
        "Draw from the likeliest tokens that together reach it; 1: all",
    ),
    "top_k": ("top-k", "Top-k"),
    "top_k_info": ("只从最可能的这么多词元里抽，0 为不限", "Draw from this many likeliest tokens; 0: all"),
    "more_sampling": ("更多采样设置", "More sampling settings"),
    "min_p": ("min-p", "Min-p"),
    "min_p_info": (
        "只从概率不低于最可能词元的这个比例的词元里抽，0 为不限",
        "Draw from tokens at least this share as likely as the likeliest; 0: all",
    ),
    "repetition_penalty": ("重复惩罚", "Repetition penalty"),
    "repetition_penalty_info": ("大于 1 时，出现过的词元不易再出现", "Above 1, tokens seen before become less likely"),
    "presence_penalty": ("出现惩罚", "Presence penalty"),
    "frequency_penalty": ("频率惩罚", "Frequency penalty"),
    "seed": ("随机种子", "Seed"),
    "seed_info": (
        "同一种子、同一对话给出同样的回答；重试用下一个种子",
        "The same seed and chat give the same answers; a retry takes the next one",
    ),
    "stop": ("停止文本", "Stop texts"),
    "stop_hint": ("一行一个；\\n 表示换行", "One a line; \\n is a new line"),
    "model": ("模型", "Model"),
    # model card
    "card_name": ("名称", "Name"),
    "card_parameters": ("参数量", "Parameters"),
    "card_dtype": ("精度", "Precision"),
    "card_context": ("上下文（词元）", "Context (tokens)"),
    "card_template": ("提示模板", "Prompt template"),
    "card_adapter": ("适配器", "Adapter"),
    "card_base": ("基座", "Base"),
    "card_engine": ("引擎", "Engine"),
    # about answers
    "answer_speed": ("{tokens} 词元，{rate} 词元/秒", "{tokens} tokens, {rate} tokens/s"),
    "first_token": ("首词元 {seconds} 秒", "first token {seconds} s"),
    "prompt_cached": ("提示 {tokens} 词元（缓存 {cached}）", "prompt {tokens} tokens ({cached} cached)"),
    "speculation": (
        "推测解码接受 {share}（启动以来 {accepted}/{drafted}）",
        "drafts accepted {share} ({accepted}/{drafted} since the start)",
    ),
    "seed_used": ("种子 {seed}", "seed {seed}"),
    "cut": ("到长度上限", "cut at the limit"),
    "stopped": ("已停止", "stopped"),
    "context_used": (
        "上下文 已用 {used} / {context} 词元，剩余 {left}",
        "Context {used} of {context} tokens used, {left} left",
    ),
    "context_unlimited": ("上下文 已用 {used} 词元", "Context {used} tokens used"),
    "dropped": ("放不下，已舍去最早的 {count} 条消息", "no room: the {count} oldest messages were left out"),
    # messages
    "busy": ("正在回答，请先停止", "An answer is being written; stop it first"),
    "cannot_answer": ("无法回答：{error}", "Cannot answer: {error}"),
    "bad_file": ("无法载入 {file}：{error}", "Cannot load {file}: {error}"),
}


def translate(name: str, language: str, texts: Mapping[str, tuple[str, str]] = TEXTS, **values: object) -> str:
    """The text in a language ("zh" or "en"), values filled in."""
    chinese, english = texts[name]
    return (english if language == "en" else chinese).format(**values)


# The chat on a terminal.
TERMINAL_TEXTS: dict[str, tuple[str, str]] = {
    "start": (
        "输入后按 Enter（{mode}）。空行或 /exit：离开。/help：命令。Ctrl-C：离开。",
        "Type and press Enter ({mode}). Empty line or /exit: leave. /help: commands. Ctrl-C: leave.",
    ),
    "remembers": ("记得前文", "the conversation is remembered"),
    "continues": ("每次续写一段；对话加 --with_prompt", "each text is continued; --with_prompt to chat"),
    "input": ("输入：", "Input: "),
    "output": ("回答：", "Output: "),
    "left": ("已离开", "left"),
    "cleared": ("对话已清空。", "The conversation was cleared."),
    "new_prompt": ("换了系统提示，开始新的对话。", "A new conversation under another system prompt."),
    "no_prompt": ("开始没有系统提示的新对话。", "A new one without a system prompt."),
    "taken_back": ("已撤回上一个问题。", "The last question was taken back."),
    "saved": ("{count} 条消息写入 {path}", "{count} messages in {path}"),
    "loaded": ("从 {path} 读入 {count} 条消息", "{count} messages from {path}"),
    "cut": (
        "{count} 个词元后截断；/continue 接着写，长度见 --max_new_tokens",
        "cut after {count} tokens; /continue goes on, see --max_new_tokens",
    ),
    "dropped": (
        "上下文 {context} 词元放不下，舍去最早的 {count} 条消息",
        "the {count} oldest messages no longer fit the context of {context} tokens",
    ),
    "help": (
        """/system 文字    换系统提示，开始新的对话（只写 /system：没有系统提示）
/reset, /clear  忘掉前文
/undo           撤回上一个问题和回答
/retry          用另一组随机数再答一次
/edit 文字      换掉上一个问题
/continue       接着上一个回答写
/history        到此为止说过的话
/save 文件      把对话写成 json；/load 文件 读入
/help           本说明；空行或 /exit 离开""",
        """/system TEXT   another system prompt (none: /system alone), and a new conversation
/reset, /clear  forget what was said
/undo          take back the last question with its answer
/retry         answer the last question again, with other random numbers
/edit TEXT     another last question instead of the one asked
/continue      go on where the last answer ended
/history       what was said so far
/save FILE     write the conversation to a json file; /load FILE reads one
/help          this; an empty line or /exit leaves""",
    ),
}
