"""Web: the chat in the browser.

  access       the flags that all of them have, passwords, and the launch itself
  base         a header, and texts that change with the language
  texts        The web demo's words in Chinese and English
  chat         The web demo's conversations, whatever shows them: turns, prompts that fit, answers as they come, and
               their words
  saved_chats  conversations saved and read again
  page         what stands on it, and what happens when it is used. All else is in web_chat

Others import: access, base, texts, chat, page.
"""
