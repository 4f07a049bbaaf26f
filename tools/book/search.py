"""Search for Chinese without a dictionary: a run of Chinese characters is indexed as its single characters and pairs.

`零點` is a pair, `縮放因子` the three pairs 縮放, 放因, 因子, all of which a page must have. Words of other scripts,
names in code included, stay whole: `gptq_model`. The browser splits the question by the same rule, `js_splitter_code`.
"""

import re

from sphinx.search import SearchLanguage

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
RUN = re.compile(rf"[{HAN}]+|[^\W{HAN}]+")


def split(text: str) -> list[str]:
    """The terms that a text is found by."""
    terms = []
    for run in RUN.findall(text):
        if re.match(f"[{HAN}]", run):
            terms += [*run, *(run[i : i + 2] for i in range(len(run) - 1))]
        else:
            terms.append(run)
    return terms


class CharacterPairs(SearchLanguage):
    lang = "zh_TW"
    language_name = "Traditional Chinese"
    # Only the pairs are asked for, where there are any: they say more than the single characters.
    js_splitter_code = (
        """
function splitQuery(query) {
  const terms = [];
  for (const run of query.match(/[HAN]+|[^\\s\\p{P}\\p{S}HAN]+(?:_[^\\s\\p{P}\\p{S}HAN]+)*|_+\\w*/gu) || []) {
    if (!/^[HAN]/.test(run) || run.length === 1) terms.push(run);
    else for (let i = 0; i + 1 < run.length; i++) terms.push(run.slice(i, i + 2));
  }
  return terms;
}
"""
    ).replace("HAN", "\\u3400-\\u4dbf\\u4e00-\\u9fff\\uf900-\\ufaff")

    def split(self, input: str) -> list[str]:
        return split(input)
