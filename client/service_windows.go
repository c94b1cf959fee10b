package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"golang.org/x/sys/windows"
	"golang.org/x/sys/windows/svc"
	"golang.org/x/sys/windows/svc/eventlog"
	"golang.org/x/sys/windows/svc/mgr"
)

// serviceName is that of the service and of its source in the event log.
const serviceName = "culvert-client"

// stopHint is how long the service manager should wait at least for the agent to say
// that it stopped: Run takes 13 s at most.
const stopHint = 20 * time.Second

// runAsService runs the agent for Windows' service manager, where that started this
// process, and tells whether it did.
func runAsService() bool {
	is, err := svc.IsWindowsService()
	if err != nil || !is {
		return false
	}
	s := service{log: io.Discard, arguments: os.Args[1:]}
	if source, err := eventlog.Open(serviceName); err == nil {
		defer source.Close()
		s.log = eventWriter{source}
	}
	if err := svc.Run(serviceName, &s); err != nil {
		fmt.Fprintf(s.log, "level=ERROR msg=\"The service failed\" err=%q\n", err)
		os.Exit(1)
	}
	return true
}

// service is the agent as the service manager sees it.
type service struct {
	log       io.Writer // a log line with each write
	arguments []string
}

// Execute runs the agent until the service manager ends it. It returns an exit code of
// the service's own: 1 the agent failed, 2 wrong arguments; the log says more.
func (s *service) Execute(_ []string, requests <-chan svc.ChangeRequest, status chan<- svc.Status) (own bool, code uint32) {
	status <- svc.Status{State: svc.StartPending}
	flags, command, err := parseFlags(s.arguments)
	if err == nil && command != "agent" {
		err = fmt.Errorf("%s is no command for a service", command)
	}
	if err != nil {
		fmt.Fprintf(s.log, "level=ERROR msg=\"Wrong arguments of the service\" err=%q\n", err)
		return true, 2
	}
	flags.log.Writer = s.log
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	hangup := make(chan os.Signal, 1)
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, flags, hangup) }()
	running := svc.Status{State: svc.Running, Accepts: svc.AcceptStop | svc.AcceptShutdown | svc.AcceptPreShutdown | svc.AcceptParamChange}
	status <- running
	for {
		select {
		case err := <-ended:
			status <- svc.Status{State: svc.StopPending}
			if err != nil {
				fmt.Fprintf(s.log, "level=ERROR msg=\"Stopped\" err=%q\n", err)
				return true, 1
			}
			return false, 0
		case request := <-requests:
			switch request.Cmd {
			case svc.Interrogate:
				status <- request.CurrentStatus
			case svc.ParamChange: // Windows has no SIGHUP
				select {
				case hangup <- syscall.SIGHUP:
				default: // one waits already
				}
				status <- running
			case svc.Stop, svc.Shutdown, svc.PreShutdown:
				status <- svc.Status{State: svc.StopPending, WaitHint: uint32(stopHint.Milliseconds())}
				stop() // the agent tells the proxies, and ends what runs
			}
		}
	}
}

// eventWriter makes an event of each log line.
type eventWriter struct{ source *eventlog.Log }

func (w eventWriter) Write(line []byte) (int, error) {
	const id = 1 // the message is what matters, and EventCreate has this one
	text := strings.TrimRight(string(line), "\n")
	report := w.source.Info
	switch {
	case strings.Contains(text, "level=ERROR"), strings.Contains(text, `"level":"ERROR"`):
		report = w.source.Error
	case strings.Contains(text, "level=WARN"), strings.Contains(text, `"level":"WARN"`):
		report = w.source.Warning
	}
	return len(line), report(id, text)
}

func addServiceCommands(app *kingpin.Application) {
	service := app.Command("service", "Install or uninstall the agent as a service of Windows. It needs an administrator.")
	service.Command("install", "Have Windows start the agent, with the flags that are given here.")
	service.Command("uninstall", "Stop the service, and remove it. What the agent stored stays.")
}

// controlService installs or uninstalls the service.
func controlService(command string, flags *flags, args []string) error {
	manager, err := mgr.Connect()
	if err != nil {
		return fmt.Errorf("service manager: %w; run this as an administrator", err)
	}
	defer manager.Disconnect()
	if command == "service uninstall" {
		return uninstallService(manager)
	}

	if err := checkConfig(io.Discard, flags); err != nil {
		return fmt.Errorf("the service would not start: %w", err)
	}
	arguments, err := serviceArguments(args)
	if err != nil {
		return err
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	s, err := manager.CreateService(serviceName, program, mgr.Config{
		DisplayName:      "Culvert agent",
		Description:      "Lets Prometheus scrape this host through culvert-proxy.",
		StartType:        mgr.StartAutomatic,
		DelayedAutoStart: true, // the network is there then
		// It has no more rights than a user, and none on other machines.
		ServiceStartName: `NT AUTHORITY\LocalService`,
		SidType:          windows.SERVICE_SID_TYPE_UNRESTRICTED,
	}, arguments...)
	if errors.Is(err, windows.ERROR_SERVICE_EXISTS) {
		return fmt.Errorf("the service %s is there already: run culvert-client service uninstall first", serviceName)
	}
	if err != nil {
		return fmt.Errorf("create the service %s: %w", serviceName, err)
	}
	defer s.Close()
	err = s.SetRecoveryActions([]mgr.RecoveryAction{
		{Type: mgr.ServiceRestart, Delay: 2 * time.Second},
		{Type: mgr.ServiceRestart, Delay: 10 * time.Second},
		{Type: mgr.ServiceRestart, Delay: 30 * time.Second},
	}, 3600)
	if err == nil {
		err = s.SetRecoveryActionsOnNonCrashFailures(true)
	}
	if err == nil {
		// A source that was left behind is as good.
		if sourceErr := eventlog.InstallAsEventCreate(serviceName, eventlog.Error|eventlog.Warning|eventlog.Info); sourceErr != nil && !strings.Contains(sourceErr.Error(), "exists") {
			err = sourceErr
		}
	}
	if err != nil {
		return errors.Join(fmt.Errorf("set up the service %s: %w", serviceName, err), s.Delete())
	}
	fmt.Printf("The service %s is installed. Start it: sc.exe start %[1]s\n", serviceName)
	return nil
}

// uninstallService waits until the service has stopped, as its files may be deleted next.
func uninstallService(manager *mgr.Mgr) error {
	s, err := manager.OpenService(serviceName)
	if err != nil {
		return fmt.Errorf("the service %s: %w", serviceName, err)
	}
	defer s.Close()
	status, err := s.Control(svc.Stop)
	if err != nil && !errors.Is(err, windows.ERROR_SERVICE_NOT_ACTIVE) {
		return fmt.Errorf("stop the service %s: %w", serviceName, err)
	}
	for deadline := time.Now().Add(stopHint); err == nil && status.State != svc.Stopped; status, err = s.Query() {
		if time.Now().After(deadline) {
			return fmt.Errorf("the service %s has not stopped within %s", serviceName, stopHint)
		}
		time.Sleep(100 * time.Millisecond) // the service manager has no event for it here
	}
	if err := s.Delete(); err != nil {
		return fmt.Errorf("delete the service %s: %w", serviceName, err)
	}
	if err := eventlog.Remove(serviceName); err != nil {
		return fmt.Errorf("the service is deleted, its source of the event log is not: %w", err)
	}
	fmt.Printf("The service %s is uninstalled.\n", serviceName)
	return nil
}
