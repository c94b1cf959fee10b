// Package help has what both programs print of their flags and commands beside --help: man
// pages, and completions for bash and zsh. Kingpin's own page takes text for markup, and has no
// line for whatis. Its scripts complete no commands and nothing behind a =, and that for zsh
// completes nothing when it is called for the first time.
package help

import (
	"strings"
	"text/template"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/prometheus/common/version"
)

// Page is what a man page says that flags and commands don't, in the man macros of roff.
type Page struct {
	Summary     string // one line, for whatis
	Description string
	// Sections are those behind the commands, from SIGNALS to SEE ALSO.
	Sections string
}

// SetTemplates has --help-man, --completion-script-bash and --completion-script-zsh print what
// this package has, in an application with Functions. The templates are kingpin's, of the whole
// program: set them before anything else runs.
func SetTemplates(page Page) {
	kingpin.ManPageTemplate = strings.NewReplacer("SUMMARY", page.Summary, "DESCRIPTION_TEXT", page.Description).Replace(manPage) +
		page.Sections + ".PP\nhttps://github.com/culvert\\-io/culvert\n"
	kingpin.BashCompletionTemplate = bashCompletion
	kingpin.ZshCompletionTemplate = zshCompletion
}

// Functions are for kingpin's UsageFuncs.
var Functions = template.FuncMap{
	"Roff": func(text string) string {
		text = strings.NewReplacer(`\`, `\(rs`, `-`, `\-`).Replace(text)
		if strings.HasPrefix(text, ".") || strings.HasPrefix(text, "'") {
			text = `\&` + text
		}
		return text
	},
	// Value says what a flag takes: its default, or a word for it. Kingpin's word is the
	// flag's whole name, where it has no other.
	"Value": func(flag *kingpin.FlagModel) string {
		value := flag.FormatPlaceHolder()
		if value == strings.ToUpper(flag.Name) {
			value = value[strings.LastIndexAny(value, ".-")+1:]
		}
		return value
	},
	"Title":   func(name string) string { return strings.ToUpper(strings.ReplaceAll(name, "-", `\-`)) },
	"Version": func() string { return version.Version },
	// Date is when the program was built, where the linker was told.
	"Date": func() string {
		built, err := time.Parse("20060102", version.BuildDate[:min(len(version.BuildDate), 8)])
		if err != nil {
			return ""
		}
		return built.Format(time.DateOnly)
	},
}

// Kingpin completes flags and their values. Commands it lists where no part of one is given.
const bashCompletion = `_{{.App.Name}}() {
	local line=${COMP_LINE:0:COMP_POINT} typed words=() word IFS=$' \t\n'
	read -ra typed <<<"$line"
	[[ $line != *[[:blank:]] ]] || typed+=('')
	for word in "${typed[@]:1}"; do
		[[ $word != --*=* ]] || words+=("${word%%=*}")
		words+=("${word#--*=}")
	done
	word=${words[${#words[@]}-1]}
	[[ $word == -* || ${#words[@]} -gt 1 && ${words[${#words[@]}-2]} == --* ]] || unset "words[${#words[@]}-1]"
	COMPREPLY=($(compgen -W "$("${typed[0]}" --completion-bash "${words[@]}" 2>/dev/null)" -- "$word"))
}
complete -F _{{.App.Name}} -o default {{.App.Name}}
`

const zshCompletion = `#compdef {{.App.Name}}

_{{.App.Name}}() {
	local word
	local -a given matches
	for word in "${(@)words[2,CURRENT]}"; do
		[[ $word != --*=* ]] || given+=("${word%%=*}")
		given+=("${word#--*=}")
	done
	compset -P '--*='
	[[ $given[-1] == -* || $given[-2] == --* ]] || given[-1]=()
	matches=(${(f)"$($words[1] --completion-bash "${(@)given}" 2>/dev/null)"})
	compadd -a matches
	if [[ $compstate[nmatches] -eq 0 && $given[-1] != -* ]]; then
		_files
	fi
}

# It is loaded at first use, as the function that its file is named for, or sourced.
if [[ $funcstack[1] == _{{.App.Name}} ]]; then
	_{{.App.Name}} "$@"
else
	compdef _{{.App.Name}} {{.App.Name}}
fi
`

const manPage = `{{define "Flags" -}}
{{range .Flags -}}
{{if not .Hidden -}}
.TP
\fB{{if .Short}}\-{{.Short|Char}}, {{end}}\-\-{{.Name|Roff}}{{if not .IsBoolFlag}}={{.|Value|Roff}}{{end}}\fR
{{.Help|Roff}}
{{end -}}
{{end -}}
{{end -}}
.TH {{.App.Name|Title}} 1 "{{Date}}" "{{.App.Name|Roff}} {{Version|Roff}}" Culvert
.SH NAME
{{.App.Name|Roff}} \- SUMMARY
.SH SYNOPSIS
.B {{.App.Name|Roff}}
[\fIflags\fR] [\fIcommand\fR [\fIargs\fR]]
.SH DESCRIPTION
DESCRIPTION_TEXT
.SH OPTIONS
Behind the = is the default, or, in capitals, what to put there.
{{template "Flags" .App -}}
.SH COMMANDS
{{range .App.FlattenedCommands -}}
{{if not .Hidden -}}
.SS {{.FullCommand|Roff}}{{if .FlagSummary}} {{.FlagSummary|Roff}}{{end}}{{range .Args}} {{if not .Required}}[{{end}}{{.Name|Roff}}{{if .Value|IsCumulative}}...{{end}}{{if not .Required}}]{{end}}{{end}}
{{.Help|Roff}}
{{template "Flags" . -}}
{{end -}}
{{end -}}
`
