"""Answer reading: the letter that a written answer names, by a small grammar of Chinese and English.

An answer becomes tokens, each of one character's kind (see _LEXICON), so that the grammar's rules are regular
expressions over words instead of letters. A choice's own text is another name of its letter. What is asked,
supposed or reported of others states nothing; the rest is cut into clauses, which

  name a letter     答案是C, 选C, C是正确答案, the answer is C, I choose C, \\boxed{C}; a letter alone, first or last
  lean to one       C正确, 应该是C, C is right, it is C; a letter alone elsewhere: where none is named
  deny letters      A不对, 不选A, 排除A、B, not A, A is wrong; all but one: the one that is left
  take back         不对, no: what stands before

Denials are read generously and the rest strictly, so that a denied letter is never the answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .questions import ChoiceQuestion
from .wordings import Mode

# Kinds of words: (kind, in Chinese, in English), the first that fits. Others are "x", letters "L".
_LEXICON = (
    # Their sentence asks; what follows is supposed or reported: neither says anything.
    ("?", r"\?", ""),
    ("q", "是不是|是否|对不对|吗|难道", "whether"),
    (
        "i",
        "如果|若(?!干)|假如|假设|假定|要是|倘若|即使|除非|以为|有的?人|有些人|[很许]多人|不少人",
        "if|suppose|supposing|assuming|unless|imagine|(?:some |many |most )?(?:people|students)|someone|mistakes?",
    ),
    # They deny what follows.
    (
        "e",
        "排除掉?|剔除|舍去|去掉|除了|除去|而不是|而非",
        "rather than|instead of|eliminat(?:e|ed|ing)|exclud(?:e|ed|ing)|rul(?:e|ed|ing) out|reject|except",
    ),
    # No negations, though they look like it.
    (" ", "不得不|不能不|不仅|不但|不只|不管|不论|无论|毫无疑问|无疑|认为", "no doubt|not only"),
    ("x", "不如|差不多|非常|不同|不少", "right now"),
    # What follows concludes or corrects; what follows goes on.
    (
        "t",
        "所以|因此|因而|故(?![事障意])|于是|综上所述|综上|总之|最终|最后|由此可见|可见|更正|纠正"
        "|但是?|可是|然而|不过|等等|等一下|而(?=是|应|该)",
        "so|therefore|thus|hence|finally|in conclusion|overall|consequently|correction"
        "|however|but|actually|wait|instead",
    ),
    (
        "k",
        "因为|由于|虽然|尽管|而且|并且|而",
        "because|since|as|which|where|while|whereas|although|though|given",
    ),
    # Right, wrong, not.
    (
        "r",
        "没错|没有错|无误|没问题|没有问题|正确|准确|恰当|合适|合理|符合(?:题意|要求|条件)?|成立|属实|更好|最好|最佳|对的"
        "|(?<=[是都也才最很太])对(?![于象比应待面方])|[✓✔√✅]",
        "correct|right|true|accurate|valid|best|appropriate",
    ),
    (
        "w",
        "不对|错误?|有误|不当|不妥|矛盾|[✗✘❌]",
        "wrong|incorrect|false|mistaken|inaccurate|invalid|untrue",
    ),
    (
        "n",
        "不|没有?|并非|非(?=[A-J])|勿|别(?=选|再选)|误(?=选)|无法|难以",
        "[a-z]+n't|not|never|neither|none|cannot|no",
    ),
    # The answer, to choose, an option, to be.
    ("a", "答案|正解|答(?=:)", "answer|solution"),
    ("c", "(?<![候当筛竞单多])选择?(?![手举民项])", "choose|choosing|chose|select|pick|go(?:ing)? with|opt for"),
    ("o", "选项|项(?![目链])|说法|观点|描述|表述|叙述|陈述|内容", "options?|choices?|statements?|letter"),
    ("=", "[是为即:]|就是|'s(?![a-z])", "is|are|was|be|seems|looks|appears"),
    # Of several; joins letters.
    ("p", "[都均全皆]", "all|both"),
    ("s", "还是|或者?|以及|[和与及、/&]", "and|or|nor"),
    # They change nothing.
    (
        " ",
        "我们?|觉得|会|的|了|吧|啊|呀|哦|嗯|应该?|应当|该|并|就|也|那么?|还|又|再|其中?|先|参考|正好"
        "|显然|肯定|一定|必须|只能|只有|只|才|更|最|太|比较|其实|确实|当然|可以|可能|能|大概|也许|或许|似乎|猜"
        "|本题|这道题|此题|这题|题|这个?|此|个|种|[ \\t\\r]|'(?:d|ll|m)(?![a-z])",
        "the|that|it|its|this|these|my|our|your|i|we|you|me|an?|of|to|for|think|believe|guess|say|either|final"
        "|would|could|should|will|may|might|must|can|definitely|certainly|probably|likely|clearly|really|surely"
        "|most|only|just|also",
    ),
    (".", r"[。!;\n]|\.{2,}|\.(?![A-Za-z0-9])|(?<=[A-Ja-j])\.", ""),
    (",", ",", ""),
)
_WORDS = re.compile(
    "|".join(
        f"(?P<k{number}>{chinese}" + (rf"|(?<![a-z])(?:{english})(?![a-z])" if english else "") + ")"
        for number, (_, chinese, english) in enumerate(_LEXICON)
    )
    + "|[a-z]+|[0-9]+|.",
    re.IGNORECASE | re.DOTALL,
)

# Letters; not in a formula, nor A and I before other words than these, nor small ones beside words.
_LETTER = re.compile(
    r"(?<![A-Za-z0-9'])(?:"
    r"A(?! +(?!(?:is|isn't|was|are|and|or|nor|can't|cannot|does|doesn't|seems|looks|should|would|may|might|must|but"
    r"|not|rather|instead|because|since|as|which)\b)[a-z])|I(?! +(?!(?:is|isn't)\b)[A-Za-z])|[B-HJ]"
    r"|(?:(?<![A-Za-z] )|(?<=answer )|(?<=option )|(?<=choice )|(?<=is )|(?<=choose )|(?<=pick ))[a-j](?! *[A-Za-z])"
    r")(?![A-Za-z0-9'])"
)
_RUN = re.compile(r"(?<![A-Za-z0-9和与及、/])[A-J]{2,}(?![A-Za-z0-9])")  # ABD错误
_FORMULA = re.compile(r"[+=^<>≤≥×÷∈∪∩]")
_BEFORE_TEXT = re.compile(r"\s*(?:选项|项)?[\s.、:\-]*")

# Rules, over kinds: a verdict on the letters before it, but not one that is on the next ones; words that lead to
# letters; a negation somewhere before them; letters alone; a verdict on what stands before; letters in lists.
_VERDICT = re.compile(r"L(?P<between>[ox=]*)(?P<words>[nwrae](?:nc|[nwreo=])*a?o*)(?![=o]*L)")
_LEAD = re.compile(r"(?P<words>[nwreaco=]+)L")
_NEGATION = re.compile(r"n[^L]*L")
_ALONE = re.compile(r"o*Lo*")
_JUDGEMENT = re.compile(r"[o=]*(?P<words>[nwre][nwro=]*)")
_LISTS = tuple(
    re.compile(pattern)
    for pattern in (r"(?:(?<![ac=])|(?<=n[ac=]))L(?:,L)*,?sL", r"(?<![ac=])L(?:,L)+(?=o?p)", r"L(?:sL)+")
)
_LEADING = re.compile(r"\s*(?:the )?(?:答案|answer)\s*(?:[是为:]|is)\s*", re.IGNORECASE)
_ASKS_FOR_WRONG = re.compile(
    r"[不错除]|非(?![洲常])|没有|无(?![机线氧色])|未(?!来)"
    r"|\b(?:NOT|EXCEPT|LEAST|incorrect|false|wrong|untrue|except)\b|not true|n't"
)


@dataclass(frozen=True)
class _Token:
    """A word: its kind, and if it is "L" the letters it names: by the text of a choice, or before that text."""

    kind: str
    letters: str = ""
    by_text: bool = False
    before_text: bool = False


@dataclass(frozen=True)
class _Clause:
    """Words up to the next comma or conjunction.

    Attributes:
        is_silent: its sentence asks, or it is supposed or reported.
        concludes: a word such as "so" or "but" stands before it.
        continues: it follows another one within a sentence, without such a word.
    """

    tokens: tuple[_Token, ...]
    is_silent: bool
    concludes: bool
    continues: bool

    @property
    def kinds(self) -> str:
        return "".join(token.kind for token in self.tokens)


@dataclass
class _Assertion:
    """Letters that a clause names (or leans to).

    Attributes:
        names: whether it names them.
        concludes: it says "so", or corrects what stands before.
        alone: they are all of the clause: "letter", or "text" if the choice's text stands behind.
    """

    letters: str
    names: bool
    concludes: bool
    alone: str = ""


def read_letter(text: str, question: ChoiceQuestion, mode: Mode) -> str | None:
    """The letter that an answer names; None where it names none, or several, or does not say clearly.

    Of several that are named one after the other the last counts, if it concludes or corrects, or after reasoning
    (mode cot). A text that is a choice's, or names one choice alone by its text, is an answer too.
    """
    return _Reader(question, mode).read(text)


class _Reader:
    """Reads one answer, clause by clause.

    What it knows so far: the assertions; the letters denied; those that were spoken of last, which "no" is about; and
    whether what comes next concludes or corrects.
    """

    def __init__(self, question: ChoiceQuestion, mode: Mode) -> None:
        self._letters, self._mode = question.letters, mode
        self._question = _fold(question.text).strip()
        asking = re.split(r"[,。;!?\n]", re.sub(r"[\s?。_():]+$", "", self._question))[-1]
        self._asks_for_wrong = bool(_ASKS_FOR_WRONG.search(asking))
        self._by_text: dict[str, str] = {}
        for letter, choice in zip(self._letters, question.choices, strict=True):
            text = _trim(_fold(choice))
            self._by_text[text] = self._by_text.get(text, "") + letter
        # Texts that are words of the grammar (对, 错), or letters, are names only where they are the whole answer.
        names = [text for text in self._by_text if text and not re.fullmatch("[a-j]", text) and _kind(text) == "x"]
        patterns = [_bounded(text) for text in sorted(names, key=len, reverse=True)]
        self._texts = re.compile("|".join(patterns) or "(?!)", re.IGNORECASE)
        self._assertions: list[_Assertion] = []
        self._denied: set[str] = set()
        self._topic, self._concludes = "", False

    def read(self, text: str) -> str | None:
        """See read_letter."""
        text = _clean(text, self._question)
        whole = _trim(_LEADING.sub("", text))
        if not re.fullmatch("[a-j]", whole) and len(self._by_text.get(whole, "")) == 1:
            return self._by_text[whole]
        clauses = list(_clauses(self._tokenise(text)))
        for number, clause in enumerate(clauses):
            self._concludes |= clause.concludes
            if not clause.is_silent:
                self._read_clause(clause, is_end=number in (0, len(clauses) - 1))
            self._topic = next((token.letters for token in reversed(clause.tokens) if token.letters), self._topic)
        return self._decide(clauses)

    # ------------------------------------------------------------ text -> tokens

    def _tokenise(self, text: str) -> Iterator[_Token]:
        place = 0
        while place < len(text):
            token, place = self._next_token(text, place)
            if token.kind != " ":
                yield token

    def _next_token(self, text: str, place: int) -> tuple[_Token, int]:
        """The token at a place, and where the next one begins."""
        run = _RUN.match(text, place)
        if run and set(run[0]) <= set(self._letters) and len(set(run[0])) == len(run[0]):
            return _Token("L", run[0]), run.end()
        found = _LETTER.match(text, place)
        if found and found[0].upper() in self._letters and not _in_formula(text, *found.span()):
            letter = found[0].upper()
            gap = _BEFORE_TEXT.match(text, found.end())
            own = gap and self._texts.match(text, gap.end())
            if own and letter in self._by_text[own[0].lower()]:
                return _Token("L", letter, before_text=True), own.end()
            colon = re.compile(r"\s*:").match(text, found.end())  # "A: ..." is a heading
            return _Token("L", letter), found.end() if not colon else colon.end() - 1
        own = self._texts.match(text, place)
        if own and not (own[0].isdigit() and _in_formula(text, *own.span())):
            return _Token("L", self._by_text[own[0].lower()], by_text=True), own.end()
        word = _WORDS.match(text, place)
        assert word is not None
        return _Token(_kind_of(word)), word.end()

    # ------------------------------------------------------------ clauses -> statements

    def _read_clause(self, clause: _Clause, is_end: bool) -> None:
        kinds = clause.kinds
        if _ALONE.fullmatch(kinds):
            self._stand_alone(clause, is_end)
        elif judged := _JUDGEMENT.fullmatch(kinds):
            self._judge_topic(judged["words"])
        place = 0
        while place < len(kinds):
            place = self._read_statement(clause, kinds, place)

    def _read_statement(self, clause: _Clause, kinds: str, place: int) -> int:
        """Read what is stated at a place of a clause; returns where to go on."""
        if verdict := _VERDICT.match(kinds, place):
            self._judge(clause, kinds, verdict)
            return verdict.end()
        if lead := _LEAD.match(kinds, place):
            last = lead.end() - 1
            verdict = _VERDICT.match(kinds, last)
            if (verdict and _denies(verdict["words"])) or not lead["words"].strip("o"):
                return last  # it is said of the letters, or leads nowhere
            self._lead_to(clause, kinds, lead["words"], last)
            return lead.end()
        if (negated := _NEGATION.match(kinds, place)) and not clause.tokens[negated.end() - 1].by_text:
            if not (self._asks_for_wrong and kinds[negated.end() - 2] == "="):
                self._deny(clause.tokens[negated.end() - 1].letters)
            elif negated.end() == len(kinds):  # which is not ... is C: the answer to a question for the wrong one
                self._assert(clause.tokens[-1].letters)
            return negated.end()
        return place + 1

    def _stand_alone(self, clause: _Clause, is_end: bool) -> None:
        token = clause.tokens[clause.kinds.index("L")]
        if clause.continues and self._assertions and not self._assertions[-1].alone:
            self._assertions[-1].letters = _union(self._assertions[-1].letters, token.letters)  # 答案是A, B
        elif len(token.letters) == 1:
            names = is_end and (self._mode != "cot" or not clause.continues)
            self._assert(token.letters, names, "text" if token.before_text else "letter")

    def _judge_topic(self, words: str) -> None:
        """不对, or 正确: of the letters that were spoken of last."""
        if _denies(words):
            self._deny(self._topic)
            self._concludes = True
        elif "r" in words and not self._asks_for_wrong:
            self._assert(self._topic)

    def _judge(self, clause: _Clause, kinds: str, verdict: re.Match[str]) -> None:
        """A正确, A不对, A是答案."""
        words, token = verdict["words"], clause.tokens[verdict.start()]
        if self._asks_for_wrong and not set(words) & set("ace"):
            return  # whether it is the answer that is right or the statement nobody knows
        before, after = kinds[: verdict.start()].rstrip("o")[-1:], kinds[verdict.end() :][:1]
        if _denies(words):
            if not (token.by_text and after):
                self._deny(token.letters)
        elif set(words) & set("raw") and "x" not in (before, after) and "x" not in verdict["between"]:
            self._assert(token.letters, names="a" in words)

    def _lead_to(self, clause: _Clause, kinds: str, words: str, place: int) -> None:
        """答案是A, 选A, 不选A, 正确的是A, 是A."""
        letters, rest = clause.tokens[place].letters, kinds[place + 1 :].strip("o")
        is_verdict = "=" in words and set(words) & set("rw") and not set(words) & set("ace")
        if is_verdict and _denies(words) == self._asks_for_wrong:
            self._assert(letters, names=not rest.startswith("x"))  # 正确的是A; 错误的是A, where that is asked for
        elif _denies(words):
            if not is_verdict or not self._asks_for_wrong:
                self._deny(letters)
        elif set(words) & set("ac") and not rest.startswith("x"):
            self._assert(letters, names=True)
        elif "=" in words and not rest and "L" not in kinds[:place]:
            self._assert(letters)

    def _assert(self, letters: str, names: bool = False, alone: str = "") -> None:
        names = names or self._concludes
        if not names or alone:  # what was denied is named anew by clear words alone
            letters = "".join(letter for letter in letters if letter not in self._denied)
        if letters:
            self._denied -= set(letters)
            self._assertions.append(_Assertion(letters, names, self._concludes, alone))
            self._concludes = False

    def _deny(self, letters: str) -> None:
        self._denied |= set(letters)
        for assertion in self._assertions:
            assertion.letters = "".join(letter for letter in assertion.letters if letter not in letters)
        self._assertions = [assertion for assertion in self._assertions if assertion.letters]

    # ------------------------------------------------------------ statements -> a letter

    def _decide(self, clauses: Sequence[_Clause]) -> str | None:
        assertions = self._without_headings()
        for group in ([a for a in assertions if a.names], assertions):
            if group:
                last = group[-1]
                agree = len({assertion.letters for assertion in group}) == 1
                clear = agree or last.concludes or (self._mode == "cot" and last.names)
                return last.letters if clear and len(set(last.letters)) == 1 else None
        left = [letter for letter in self._letters if letter not in self._denied]
        return left[0] if len(left) == 1 else self._only_text(clauses)

    def _without_headings(self) -> list[_Assertion]:
        """The assertions, without letters that stand alone beside others that do: they head explanations, or quote."""
        found = self._assertions
        for kind in ("letter", "text"):
            alone = {assertion.letters for assertion in found if assertion.alone == kind}
            if alone:
                kept = kind if len(alone) == 1 else ""
                return [assertion for assertion in found if assertion.alone in ("", kept)]
        return found

    def _only_text(self, clauses: Sequence[_Clause]) -> str | None:
        """The one choice whose text is there, where nothing is denied and no letter spoken of."""
        spoken = [clause for clause in clauses if not (clause.is_silent or set(clause.kinds) & set("nwe"))]
        tokens = [token for clause in spoken for token in clause.tokens if token.kind == "L"]
        found = {token.letters for token in tokens}
        if len(found) != 1 or not all(token.by_text for token in tokens):
            return None
        (letters,) = found
        text = next((text for text, named in self._by_text.items() if named == letters), "")
        return letters if len(text) > 1 and not text.isdigit() and letters not in self._denied else None


# ---------------------------------------------------------------- words


def _fold(text: str) -> str:
    """Full-width letters and punctuation as ASCII, without LaTeX, brackets, quotes and stars."""
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"\b[A-Za-z]\([A-Za-z0-9, ]{1,9}\)", "_", text)  # P(A) is no letter
    text = re.sub(r"\\boxed\s*\{", " 答案 {", text)
    text = re.sub(r"\\(?:text|math)?(?:rm|bf|it)?\b", " ", text)
    return re.sub(r"""[\[\](){}<>"“”‘’「」『』【】《》*`$_#\\]""", " ", text)


def _bounded(text: str) -> str:
    """A pattern for the text, not within a longer word or number."""
    before = "(?<![a-z0-9])" if re.match("[a-z0-9]", text) else ""
    return before + re.escape(text) + ("(?![a-z0-9])" if re.search("[a-z0-9]$", text) else "")


def _trim(text: str) -> str:
    """The text as choices are compared by."""
    return text.strip(" .。!\n").lower()


def _clean(text: str, question: str) -> str:
    """The answer itself: without reasoning in its own tags, the question where it is repeated, and further ones."""
    text = re.sub(r"<think>.*?(?:</think>|$)", " ", text, flags=re.DOTALL)
    text = _fold(text.rpartition("</think>")[2])
    if len(question) > 3:
        text = re.sub(rf"(?:(?:题目|问题|question)\s*:\s*)?{re.escape(question)}", "\n", text, flags=re.IGNORECASE)
    parts = re.split(r"(?<=\S)\s*\n\s*(?:题目|问题|question|q)\s*[0-9]*\s*:", text, maxsplit=1, flags=re.IGNORECASE)
    return re.sub(r":\s+", ":", parts[0])


def _in_formula(text: str, start: int, end: int) -> bool:
    around = text[:start].rstrip()[-1:] + text[end:].lstrip()[:1]
    return bool(_FORMULA.search(around))


def _kind_of(word: re.Match[str]) -> str:
    return _LEXICON[int(word.lastgroup[1:])][0] if word.lastgroup else "x"


def _kind(text: str) -> str:
    word = _WORDS.fullmatch(text)
    return _kind_of(word) if word else "x"


def _union(*letters: str) -> str:
    return "".join(dict.fromkeys("".join(letters)))


def _denies(words: str) -> bool:
    """Whether an odd number of them does: 没有错 is right."""
    return sum(words.count(kind) for kind in "nwe") % 2 == 1


# ---------------------------------------------------------------- clauses


def _clauses(tokens: Iterator[_Token]) -> Iterator[_Clause]:
    """The clauses that have words, lists of letters joined."""
    sentence: list[_Token] = []
    concludes = False
    for token in (*tokens, _Token(".")):
        if token.kind not in ".?t":
            sentence.append(token)
            continue
        sentence = _join_lists(sentence)
        kinds = "".join(part.kind for part in sentence)
        asks = token.kind == "?" or "q" in kinds
        supposes = kinds.find("i") if "i" in kinds else len(sentence)  # from here on
        parts = [(part, asks) for part in _split(sentence[:supposes])]
        parts += [(part, True) for part in _split(sentence[supposes:])]
        for number, (part, is_silent) in enumerate(parts):
            yield _Clause(part, is_silent, concludes and number == 0, number > 0)
        if parts or token.kind == "t":
            concludes = token.kind == "t"
        sentence = []


def _join_lists(sentence: list[_Token]) -> list[_Token]:
    """A, B和D as one token of several letters."""
    for pattern in _LISTS:
        kinds = "".join(token.kind for token in sentence)
        for match in reversed(list(pattern.finditer(kinds))):
            members = [token for token in sentence[slice(*match.span())] if token.kind == "L"]
            joined = _Token("L", _union(*(t.letters for t in members)), all(token.by_text for token in members))
            sentence = [*sentence[: match.start()], joined, *sentence[match.end() :]]
    return sentence


def _split(sentence: Sequence[_Token]) -> Iterator[tuple[_Token, ...]]:
    part: list[_Token] = []
    for token in (*sentence, _Token(",")):
        if token.kind in ",ks" or (token.kind == "e" and part and part[-1].kind == "L"):
            if part:
                yield tuple(part)
            part = [token] if token.kind == "e" else []
        elif token.kind not in "pqi":
            part.append(token)
