"""Web: the chat in the browser.

The command line's chat is led by chat and saved_chats too, so these two bring in no gradio.

  access       the flags that all of them have, passwords, and the launch itself
  base         a header, and texts that change with the language
  markup       what a text shows on a page, whoever wrote it
  texts        words of the pages in Chinese and English
  chat         conversations, whatever shows them: turns, prompts that fit, answers as they come, and their words
  saved_chats  conversations saved and read again
  page         what stands on it, and what happens when it is used; all else is in chat

Others import: access, base, markup, texts, chat, saved_chats, page.
"""
