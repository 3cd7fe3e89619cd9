// The page in Chinese, by its English text.

export const ZH: Record<string, string> = {
  // frame
  "Skip to your message": "跳到输入框", "Conversations": "对话", "Conversations (s)": "对话 (s)", "Parameters": "参数", "Parameters (p)": "参数 (p)", "Close": "关闭", "New chat": "新对话",
  "Help": "帮助", "Help (?)": "帮助 (?)", "Model": "模型", "Adapters of {model}": "{model} 的适配器", "Light theme": "浅色主题", "Dark theme": "深色主题",
  "The server wants an API key.": "服务器需要 API 密钥。", "API key": "API 密钥", "Kept in this tab until it is closed, and sent to this server only.": "只保存在本标签页,关闭即清除;只发送给本服务器。",
  "Cancel": "取消", "Use this key": "使用此密钥", "Enter a key": "输入密钥",
  // keys
  "Keys": "快捷键", "A new line": "换行", "In an empty field: edit the last question": "输入框为空时:修改上一个问题", "To the message field": "跳到输入框", "Next and previous conversation": "下一个、上一个对话",
  "Edit the last question": "修改上一个问题", "In the tokens: move; up and down by ten": "在词元中:移动;上下键每次十个", "In the tokens: another layer": "在词元中:换一层", "Dark or light": "深色或浅色", "中文 / English": "中文 / English", "This help": "本帮助",
  "Conversations and settings stay in this browser. The API key stays in this tab. Nothing is sent anywhere but to this server.": "对话与设置保存在本浏览器,API 密钥只保存在本标签页;除本服务器外不向任何地方发送数据。",
  "An edited question and a second answer are kept beside the first: ‹ 1/2 › switches.": "修改后的问题与重新生成的回答都与原来的并存:用 ‹ 1/2 › 切换。",
  "Tokens under an answer shows which experts and branches made each of them, and how likely it was.": "回答下方的“词元”显示每个词元由哪些专家和分支产生,以及它的概率。",
  // message field
  "Your message": "你的消息", "Stop the answer": "停止回答", "Stop (Esc)": "停止 (Esc)", "Send": "发送", "Send (Enter)": "发送 (Enter)", "Ask something": "问点什么",
  "The beginning of a text, for the model to continue": "一段文本的开头,由模型续写", "The browser does not allow copying": "浏览器不允许复制", "Copied": "已复制",
  // messages
  "Conversation": "对话", "You": "你", "Copy": "复制", "Edit": "修改", "Edit: ask in other words": "修改:换一种问法", "The question in other words": "换一种问法", "Both wordings are kept: ‹ › switches between them.": "两种问法都会保留:用 ‹ › 切换。",
  "End of the answer.": "回答结束。", "Answer of {model}": "{model} 的回答", "the model": "模型", "Thoughts": "思考过程", "The model reads the question": "模型正在读问题", "Answer again": "重新回答", "Answer again (r)": "重新回答 (r)",
  "Experts, branches and probabilities of each token": "每个词元的专家、分支与概率", "Tokens": "词元", "Continue": "继续", "Ended: {why}": "已结束:{why}", "The answer reached its longest length.": "回答达到最大长度。", "Stopped.": "已停止。",
  "The server's time for one answer ran out.": "服务器给单个回答的时间已用完。", "The model asks for a tool, which this page cannot run.": "模型请求调用工具,本页面无法执行。", "Answer again with token details": "带词元详情重新回答",
  "Version {i} of {n}": "第 {i} 个版本,共 {n} 个", "Earlier version": "前一个版本", "Later version": "后一个版本", "Token details were not asked for with this answer.": "生成这个回答时没有请求词元详情。",
  "This answer came without token details: they are kept until the page is closed, and not every server or model has them.": "这个回答没有词元详情:详情只保留到页面关闭,而且并非每个服务器或模型都提供。",
  "Show {n} earlier messages": "显示更早的 {n} 条消息", "To the end": "到末尾", "none": "无", "How the model should behave in this conversation": "模型在本对话中应如何表现", "System prompt": "系统提示", "Before the text": "文本之前",
  "Formula": "公式", "Table": "表格", "code": "代码", "Copy code": "复制代码", "Code in {language}": "{language} 代码", "done": "已完成", "open": "未完成",
  // numbers
  "Speed": "速度", "Tokens a second after the first token": "首个词元之后每秒的词元数", "tokens/s": "词元/秒", "Time to the first token": "首词元时间", "From pressing send to the first token, the network included": "从按下发送到首个词元,含网络时间",
  "first after {x}": "首词元 {x}", "Answer": "回答", "Tokens of the answer": "回答的词元数", "{n} tokens": "{n} 个词元", "Prompt": "提示", "Tokens of the prompt; cached ones were not computed again": "提示的词元数;已缓存的没有重新计算", "prompt {n}": "提示 {n}", "{n} cached": "缓存 {n}",
  // errors
  "Another tab receives this answer.": "另一个标签页正在接收此回答。", "The page was closed before the answer ended.": "回答未完,页面已关闭。",
  "The server is busy.": "服务器繁忙。", "The server is not ready.": "服务器尚未就绪。", "The connection ended before the answer did.": "回答未完,连接已断开。", "The server cannot be reached.": "无法连接服务器。", "The server refused the request.": "服务器拒绝了请求。", "The server failed.": "服务器出错。",
  "This model has no chat template. It can continue a text: what you write is its beginning.": "这个模型没有对话模板,但可以续写文本:你写的就是开头。", "Continue the text": "续写文本", "Try again in {n} s": "{n} 秒后重试", "Try again": "重试",
  "The question is sent when it is ready.": "就绪后会自动发送问题。", "Do not wait": "不再等待",
  // parameters
  "Drawing tokens": "词元采样", "Temperature": "温度", "0: always the most likely token. Higher: more varied.": "0:总取最可能的词元;越高越多样。", "Top-p": "Top-p", "Draw from the smallest set of tokens with this much probability.": "从累计概率达到此值的最小词元集合中采样。",
  "Top-k": "Top-k", "Draw from the k most likely tokens. 0: from all.": "从最可能的 k 个词元中采样;0:不限。", "Min-p": "Min-p", "Leave out tokens less likely than this share of the most likely one.": "去掉概率低于最大概率此比例的词元。",
  "Length and end": "长度与结束", "Longest answer": "回答最大长度", "In tokens.": "以词元计。", "Seed": "随机种子", "The same seed and question give the same answer.": "相同的种子和问题给出相同的回答。",
  "Penalties": "惩罚", "Presence penalty": "出现惩罚", "Against tokens that were said at all.": "针对已出现过的词元。", "Frequency penalty": "频率惩罚", "Against tokens, by how often they were said.": "按词元已出现的次数。", "Repetition penalty": "重复惩罚", "Divides the scores of tokens that were read or said. 1: off.": "除以读过或说过的词元的分数;1:关闭。",
  "Form of the answer": "回答的格式", "Free": "自由", "JSON": "JSON", "JSON schema": "JSON 模式", "Schema": "模式", "Without a schema the answer is free.": "没有模式时回答不受约束。", "No JSON schema: {why}": "不是 JSON 模式:{why}", "The answer will match it.": "回答将符合它。",
  "Token details": "词元详情", "Experts and branches": "专家与分支", "which ones worked on each token": "每个词元由哪些处理", "Probabilities": "概率", "of each token and its alternatives": "每个词元及其备选", "Alternatives": "备选",
  "Use of the model": "模型的用法", "Chat": "对话", "Continue a text": "续写文本", "For models without a chat template: the words go to the model as they are.": "用于没有对话模板的模型:文字原样送入模型。", "Reset to the server's defaults": "恢复服务器默认值",
  "Presets": "预设", "Preset": "预设", "Changed": "已修改", "Keep as a preset": "存为预设", "Delete the preset": "删除预设", "Name of the preset": "预设名称", "Keep": "保存", "Server's defaults": "服务器默认", "Precise": "精确", "Balanced": "平衡", "Creative": "创意",
  "default": "默认", "{name}: the server's default": "{name}:服务器默认值", "The server's default": "服务器默认值", "{name}, slider": "{name},滑块", "A number from {low} to {high}": "{low} 到 {high} 之间的数", "Stop texts": "停止文本", "one a line; \\n is a line break": "每行一个;\\n 表示换行",
  // conversations
  "{file} is no export of this page": "{file} 不是本页面导出的文件", "{n} conversations came in": "导入了 {n} 个对话", "Search": "搜索", "Search conversations": "搜索对话", "Untitled": "未命名", "Rename {title}": "重命名 {title}", "Rename": "重命名", "Export {title}": "导出 {title}", "Export": "导出",
  "Delete {title}": "删除 {title}", "Delete": "删除", "Export all": "全部导出", "Import": "导入", "answering": "正在回答", "New name": "新名称", "Delete this conversation?": "删除这个对话?", "Keep it": "保留",
  "“{title}” has {n} messages. It is only in this browser, and cannot be brought back.": "“{title}”有 {n} 条消息,只保存在本浏览器,删除后无法恢复。", "No conversation has these words.": "没有对话包含这些字。", "Conversations stay in this browser.": "对话只保存在本浏览器。",
  "The browser keeps no more: export conversations and delete some, or the newest words are lost with the page.": "浏览器存储已满:请导出并删除一些对话,否则最新的内容会随页面关闭而丢失。",
  // tokens
  "Coloured by": "着色依据", "Experts": "专家", "Global branch": "全局分支", "Probability": "概率", "Layer": "层", "Layer before": "上一层", "Layer after": "下一层", "Layer {n}": "第 {n} 层", "layer {n}": "第 {n} 层",
  "Tokens; arrow keys move, [ and ] change the layer": "词元;方向键移动,[ 和 ] 换层", "Show all {n} tokens": "显示全部 {n} 个词元", "expert {n}": "专家 {n}", "global share {x}": "全局占比 {x}", "probability {x}": "概率 {x}",
  "Number and colour: the expert with the largest gate.": "数字与颜色:门控最大的专家。", "Number and bar: per cent of the global branch; the rest is the window's.": "数字与条:全局分支的百分比,其余属于窗口分支。",
  "Point at a token, or walk with the arrow keys, to see its gates and its alternatives.": "指向一个词元,或用方向键移动,查看它的门控与备选。", "token {i} of {n}": "第 {i} 个词元,共 {n} 个", "Experts in layer {n}": "第 {n} 层的专家", "In every layer": "在每一层",
  "Load of the experts in layer {n}": "第 {n} 层专家的负载", "share of the answer's tokens; {k} experts a token": "占回答词元的比例;每个词元 {k} 个专家", "{n} seen nowhere": "{n} 个未被使用", "Expert {e}: {x} of the tokens, mean gate {g}": "专家 {e}:{x} 的词元,平均门控 {g}", "All layers": "所有层",
  "Load of the experts by layer": "各层专家的负载", "Layer {l}, expert {e}: {x} of the tokens": "第 {l} 层,专家 {e}:{x} 的词元", "Press a row to colour the tokens by that layer.": "点一行,按该层给词元着色。", "Arrow keys move between cells.": "方向键在格子间移动。", "not logged": "无数据",
  "Share of the global branch": "全局分支的占比", "Share of the global branch, token by token": "逐词元的全局分支占比", "Layer {n}: {low} to {high}, {mean} on average": "第 {n} 层:{low} 到 {high},平均 {mean}", "“{token}” in layer {l}: {x} global": "“{token}”在第 {l} 层:全局 {x}", "A column is a token of the answer.": "一列是回答的一个词元。",
  // an empty conversation
  "The server has no model": "服务器没有模型", "room for {n} tokens": "可容纳 {n} 个词元", "{n} parameters": "{n} 参数", "{n} experts in {k} layers": "{k} 层中各 {n} 个专家", "{k} hybrid layers": "{k} 个混合层", "this model has neither": "此模型两者都没有", "To begin with": "可以这样开始", "The page looks again by itself.": "页面会自动重试。", "Continues the text you begin.": "续写你开头的文本。", "Answers come from this server; nothing is sent elsewhere.": "回答来自本服务器,数据不会发往别处。",
  "Explain in three sentences how a mixture of experts chooses its experts.": "用三句话解释混合专家模型如何选择专家。", "Write a Python function that merges two sorted lists, and test it.": "写一个合并两个有序列表的 Python 函数,并测试它。",
  "Make a table of four sorting algorithms with their cost.": "用表格列出四种排序算法及其复杂度。", "What is the difference between global and sliding-window attention?": "全局注意力与滑动窗口注意力有什么区别?",
};
