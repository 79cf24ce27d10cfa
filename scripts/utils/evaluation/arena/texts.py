"""The arena's words in Chinese and English, beside those of every page."""

from __future__ import annotations

from functools import partial

from ...web import texts

# name: (Chinese, English); names in braces are filled in.
ARENA_TEXTS: dict[str, tuple[str, str]] = {
    "arena": ("模型竞技场", "Model arena"),
    "arena_battle": ("对战", "Battle"),
    "arena_results": ("结果", "Results"),
    "arena_greeting": (
        "### 两个模型，同一个问题，名字先不说\n\n按“下一题”，或在下面写一个问题；比较两边的回答，投一票，再看它们是谁",
        "### Two models, one question, no names\n\nPress “Next question” or type one; compare, vote, see who they are",
    ),
    "arena_question": ("自己出题，Enter 发送，Shift+Enter 换行", "Ask your own. Enter: send, Shift+Enter: new line"),
    "arena_next": ("下一题 ▶", "Next question ▶"),
    "arena_all": ("全部类别", "All categories"),
    "arena_side_0": ("模型 A", "Model A"),
    "arena_side_1": ("模型 B", "Model B"),
    "vote_left": ("👈 A 更好", "👈 A is better"),
    "vote_right": ("👉 B 更好", "👉 B is better"),
    "vote_tie": ("🤝 不相上下", "🤝 A tie"),
    "vote_both_bad": ("👎 都不好", "👎 Both are bad"),
    "arena_revealed": ("A 是 {left}，B 是 {right}。已记录：{vote}", "A is {left}, B is {right}. Recorded: {vote}"),
    "arena_writing": ("两个模型正在回答……", "Both are answering ..."),
    "arena_to_vote": ("哪个回答更好？投票后揭晓名字", "Which answer is better? Names are shown after the vote"),
    "arena_failed": ("有一个模型答不出来，这一题不计；请换一题", "One of them failed; no vote on this, take the next"),
    "arena_unsaved": ("没有记下这一票：{error}", "The vote could not be written: {error}"),
    "arena_empty": ("还没有投票", "No votes yet"),
    "arena_groups": (
        "这些模型还没有通过对战连在一起，组与组之间的分数不能比较：{groups}",
        "No battles connect these groups of models, so their ratings cannot be compared: {groups}",
    ),
    "arena_battles": ("{count} 场对战", "{count} battles"),
    "arena_about": (
        "名次：1 加上在 97.5 % 的自助抽样里更强的模型数。Bradley-Terry 与 Elo：400 分为 10 比 1，平均 1500，"
        "方括号里是 95 % 区间；平局算各胜半场。胜率不计平局。",
        "Rank: 1 + the models that are stronger in 97.5 % of the bootstrap rounds. Bradley-Terry and Elo: 400 points "
        "are 10 to 1, the mean is 1500, brackets hold 95 % intervals; a tie is half a win for both. "
        "Win rates leave ties out.",
    ),
    "arena_pairs": (
        "行胜列的比例（%），不计平局；括号里是场数",
        "The row beats the column (%), ties left out; (battles)",
    ),
    "category_typed": ("自己出的题", "Typed questions"),
    "category_writing": ("写作", "Writing"),
    "category_roleplay": ("角色扮演", "Role play"),
    "category_reasoning": ("推理", "Reasoning"),
    "category_math": ("数学", "Mathematics"),
    "category_coding": ("编程", "Coding"),
    "category_knowledge": ("知识", "Knowledge"),
    "category_language": ("语言文字", "Chinese language"),
    "category_translation": ("翻译", "Translation"),
    "category_reading": ("阅读理解", "Reading"),
    "category_advice": ("生活建议", "Advice"),
    "column_rank": ("名次", "Rank"),
    "column_model": ("模型", "Model"),
    "column_rating": ("Bradley-Terry", "Bradley-Terry"),
    "column_elo": ("Elo", "Elo"),
    "column_win_rate": ("胜率（%）", "Win rate (%)"),
    "column_record": ("胜 / 负 / 平 / 都不好", "Won / lost / tied / both bad"),
}
TEXTS = texts.TEXTS | ARENA_TEXTS
translate = partial(texts.translate, texts=TEXTS)
