package main

import "github.com/culvert-io/culvert/protocol/help"

func init() {
	help.SetTemplates(help.Page{
		Summary: `agent that lets Prometheus scrape its host through culvert\-proxy`,
		Description: `It runs on a host behind a firewall or NAT, dials out to one or more proxies, and keeps a tunnel to each.
Prometheus scrapes through the proxy what \fB\-\-allow\fR and \fB\-\-target\fR open; nothing else is reachable.
It serves the textfiles of its host, and takes pushes of the host's batch jobs.`,
		Sections: `.SH SIGNALS
.TP
SIGHUP
Read the configuration file again.
.TP
SIGTERM, SIGINT
Tell the proxies, let running scrapes end, and stop.
.SH EXIT STATUS
0, or 1 after an error.
Of \fBpush\fR: 1 not taken in time, 2 bad input, 3 refused.
Of \fBrun\fR: that of the job; 128+n where the signal n ended it, 127 not found, 126 not executable, 125 there was no run.
.SH ENVIRONMENT
.TP
HTTPS_PROXY, HTTP_PROXY, NO_PROXY
How the proxies are reached. Scrapes don't use them.
.TP
CULVERT_PUSH_URL
The same as \fB\-\-push\-url\fR.
.TP
CULVERT_METRICS_FILE
For the job of \fBrun\fR: the file that it may write metrics to.
.SH FILES
.TP
/etc/default/culvert\-client
Flags of the service, in packages.
.TP
/etc/culvert\-client/client.yml
Its configuration file.
.TP
/var/lib/culvert\-client
Its directory, for the agent's key and for pushes.
.SH EXAMPLES
.nf
culvert\-client \-\-proxy\-url=http://proxy.example.net:8080 \-\-allow=9100
culvert\-client \-\-proxy\-url=http://proxy.example.net:8080 \-\-allow=9100 doctor 9100
culvert\-client run \-\-job=backup \-\-interval=24h \-\- ./backup.sh
.fi
.SH SEE ALSO
.BR culvert\-proxy (1)
`,
	})
}
