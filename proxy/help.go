package main

import "github.com/culvert-io/culvert/protocol/help"

func init() {
	help.SetTemplates(help.Page{
		Summary: `Prometheus scrapes to agents behind firewalls, and a push store for batch jobs`,
		Description: `It runs where Prometheus can reach it, and takes the tunnels that agents dial from behind firewalls and NAT.
Prometheus scrapes through it with its ordinary proxy_url, and finds its targets at /targets.
Batch jobs push to it, by the Pushgateway's API.`,
		Sections: `.SH SIGNALS
.TP
SIGHUP
Read \fB\-\-config.file\fR again. Where it is wrong, the old configuration stays.
.TP
SIGTERM, SIGINT
Send the agents away, let running scrapes end for at most \fB\-\-web.shutdown\-timeout\fR, and stop.
.SH EXIT STATUS
0, or 1 after an error.
.SH ENVIRONMENT
.TP
GOGC
The headroom of the garbage collector, which is fitted to the heap otherwise.
.SH FILES
.TP
/etc/default/culvert\-proxy
Flags of the service, in packages.
.TP
/etc/culvert\-proxy/proxy.yml
Its configuration file.
.TP
/var/lib/culvert\-proxy
Its directory; data/ in it has the known agents and the pushed groups.
.SH EXAMPLES
.nf
culvert\-proxy \-\-agent.listen\-address=:8443
culvert\-proxy import \-\-from=http://old\-pushgateway:9091 \-\-to=http://proxy.example.net:8080
.fi
.SH SEE ALSO
.BR culvert\-client (1)
`,
	})
}
